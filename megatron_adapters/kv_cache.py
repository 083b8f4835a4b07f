"""Keys and values of all live sequences, in lanes whose room is reserved before a sequence starts.

A *lane* is one sequence's room in every layer. Lanes of equal length (a power of two) make a *lane group*: per layer
one tensor of keys and one of values, live lanes always its first rows, so that attention over all of them is one call
on a view (a paged cache would have to gather its pages in every layer and step where no paged kernel exists). A
released lane is filled with the last live one. The number of cached tokens is bounded by a budget agreed at start; a
sequence that finds no room waits, and one that is running is never pushed out.

Shapes: N live lanes of a group, R its rows, H local KV heads, C tokens of a lane, L tokens in use, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import huge_pages

_SMALLEST_LANE = 64


@dataclass(frozen=True)
class KvShape:
    """What one cached token costs on this rank: num_layers * num_kv_heads * (head_dim + value_dim) numbers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    value_dim: int | None = None
    """of a head's value, where it is not head_dim"""

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.num_kv_heads * sum(self.dims) * self.dtype.itemsize

    @property
    def dims(self) -> tuple[int, int]:
        """Of a key and of a value."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim


@dataclass(eq=False)
class Lane:
    """One sequence's room. `row` changes when a neighbour is released: read it anew in every step."""

    group: LaneGroup
    row: int


class LaneGroup:
    """Lanes of one length; live ones are rows 0 to N - 1."""

    def __init__(self, shape: KvShape, lane_tokens: int) -> None:
        self.shape = shape
        self.lane_tokens = lane_tokens
        self.lanes: list[Lane] = []
        self.num_rows = 0
        key_dim, value_dim = shape.dims
        self.keys_RHCD: list[Tensor] = [self._rows(0, key_dim) for _ in range(shape.num_layers)]
        self.values_RHCD: list[Tensor] = [self._rows(0, value_dim) for _ in range(shape.num_layers)]
        # Added to attention scores: 0 where a lane holds a token, -inf beyond.
        self.mask_RC = torch.empty(0, lane_tokens, dtype=shape.dtype, device=shape.device)
        self._in_use: tuple[tuple[int, int], list[tuple[Tensor, Tensor]]] = (0, 0), []

    def _rows(self, num_rows: int, dim: int) -> Tensor:
        # Zeros, not empty: a masked position has weight 0, and 0 * NaN of uninitialised memory is NaN.
        shape, sizes = self.shape, (num_rows, self.shape.num_kv_heads, self.lane_tokens, dim)
        if shape.device.type == "cpu":
            return huge_pages.zeros(sizes, shape.dtype)
        return torch.zeros(*sizes, dtype=shape.dtype, device=shape.device)

    def resize(self, num_rows: int) -> None:
        """Give the group this many rows, keeping the live ones; layer by layer, so the peak is one layer more."""
        live = len(self.lanes)
        self._in_use = (0, 0), []  # these views would keep the old tensors of every layer
        for tensors in (self.keys_RHCD, self.values_RHCD):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._rows(num_rows, old.shape[-1])
                tensors[layer][:live] = old[:live]
        mask_RC = self.mask_RC.new_full((num_rows, self.lane_tokens), float("-inf"))
        mask_RC[:live] = self.mask_RC[:live]
        self.mask_RC, self.num_rows = mask_RC, num_rows

    def in_use(self, num_lanes: int, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Views of the keys and values of every layer, [N, H, L, D]. Who keeps them keeps what a resize replaces."""
        if self._in_use[0] != (num_lanes, num_tokens):
            layers = zip(self.keys_RHCD, self.values_RHCD, strict=True)
            views = [(keys[:num_lanes, :, :num_tokens], values[:num_lanes, :, :num_tokens]) for keys, values in layers]
            self._in_use = (num_lanes, num_tokens), views
        return self._in_use[1]

    def take(self) -> Lane:
        lane = Lane(self, len(self.lanes))
        self.mask_RC[lane.row] = float("-inf")
        self.lanes.append(lane)
        return lane

    def give_back(self, lane: Lane, *, tainted: bool) -> None:
        """Move the last live lane into this one's place."""
        last = self.lanes.pop()
        if last is not lane:
            for tensors in (self.keys_RHCD, self.values_RHCD):
                for tensor in tensors:
                    tensor[lane.row] = tensor[last.row]
            self.mask_RC[lane.row] = self.mask_RC[last.row]
            self.lanes[lane.row] = last
        if tainted:  # NaN left in a free row would reach its next owner through 0 * NaN
            for tensors in (self.keys_RHCD, self.values_RHCD):
                for tensor in tensors:
                    tensor[last.row].zero_()
        last.row = lane.row


@dataclass
class KvCache:
    """All lane groups within one budget of tokens. Local to a rank; equal decisions on all ranks of a TP group."""

    shape: KvShape
    budget_tokens: int
    """Tokens cached at most, all groups together; equal on all ranks."""
    max_context: int
    max_rows: int = 256
    """Sequences at most: bounds the width of a decode step, and of the draw after a prefill."""
    groups: dict[int, LaneGroup] = field(default_factory=dict)

    def longest(self) -> int:
        """Tokens of the longest sequence that could ever be held."""
        return min(self.budget_tokens, self.max_context)

    def num_live(self) -> int:
        return sum(len(group.lanes) for group in self.groups.values())

    def reserve(self, num_tokens: int) -> Lane | None:
        """Room for a sequence of at most this many tokens, or None: wait until another is released."""
        if num_tokens > self.longest() or self.num_live() >= self.max_rows:
            return None
        lane_tokens = min(max(_SMALLEST_LANE, 1 << (num_tokens - 1).bit_length()), self.longest())
        group = self.groups.get(lane_tokens)
        if group is None:
            group = LaneGroup(self.shape, lane_tokens)
        if len(group.lanes) == group.num_rows:
            if (num_rows := self._rows_to_grow_to(group)) == group.num_rows:
                return None
            group.resize(num_rows)
            self.groups[lane_tokens] = group
        return group.take()

    def _rows_to_grow_to(self, group: LaneGroup) -> int:
        """Twice as many, or as many as the budget leaves; other groups give up their unused rows first if need be.

        Only where that makes room: who waits asks again at every step, and each time they would move what they hold.
        """
        others = [other for other in self.groups.values() if other is not group]
        wanted = min(max(4, 2 * group.num_rows), self.max_rows)
        room = self.budget_tokens - sum(other.num_rows * other.lane_tokens for other in others)
        if wanted * group.lane_tokens > room:
            room = self.budget_tokens - sum(len(other.lanes) * other.lane_tokens for other in others)
            if room // group.lane_tokens <= group.num_rows:
                return group.num_rows
            for other in others:
                if len(other.lanes) < other.num_rows:
                    other.resize(len(other.lanes))
        return max(group.num_rows, min(wanted, room // group.lane_tokens))

    def release(self, lane: Lane, *, tainted: bool = False) -> None:
        """Free a lane; `tainted` where its keys or values may hold NaN or infinity."""
        lane.group.give_back(lane, tainted=tainted)

    def drop_unused(self) -> None:
        """Hand all memory back while nothing is live: training needs it."""
        assert self.num_live() == 0, f"{self.num_live()} lanes are live"
        self.groups.clear()
