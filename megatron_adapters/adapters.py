"""One adapter: its A and B matrices (this rank's shards), their gradients and their optimizer state.

All float32 state of an adapter lies in four flat buffers of one layout: replicated matrices first, then those of
key-value heads of which several TP ranks hold the same, then those split over TP, then those split over EP. So
summing gradients, clipping and stepping are a few operations on long vectors, whatever the number of layers. A pipeline
stage holds the matrices of its own layers.

`LoraWeights` is what a forward needs; `Adapter` is one that can be trained; a snapshot is a `LoraWeights` that is
frozen, in the compute dtype, and shares nothing with the adapter it was taken from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .interface import Layout
from .placement import Place
from .projections import Projection

Axis = Literal["tp", "kv", "ep"] | None


class LoraPair(NamedTuple):
    """This rank's part of one projection's matrices: a [rank, d_in (/ tp_size)], b [d_out (/ tp_size), rank].

    Experts: a [E or 1, rank, d_in], b [E or 1, d_out, rank], with E this rank's experts.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class LoraWeights:
    """What a forward adds to the base: pairs by Hugging Face module path. A path that is absent is not adapted."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    pairs: Mapping[str, LoraPair]
    per_expert: bool = False
    """see projections.projections"""
    kept: dict[tuple[str, ...], Any] = field(default_factory=dict, compare=False, repr=False)
    """What lora_inference.py has put together once, by fused paths; filled for snapshots only."""
    stacks: dict[tuple[str, ...], Any] = field(default_factory=dict, compare=False, repr=False)
    """The same of lora_stack.py: views, where the adapter is trained."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def num_bytes(self) -> int:
        """Of a snapshot on this rank, what has been put together from it included."""
        matrices = sum(part.nbytes for pair in self.pairs.values() for part in pair)
        return matrices + sum(update.num_bytes for update in self.kept.values() if update is not None)

    def snapshot(self, dtype: torch.dtype) -> LoraWeights:
        """A frozen copy in the compute dtype: the numbers a forward of this adapter uses now."""
        copies = {
            path: LoraPair(*(part.detach().to(dtype, copy=True) for part in pair)) for path, pair in self.pairs.items()
        }
        return LoraWeights(self.rank, self.alpha, self.targets, copies, self.per_expert)


@dataclass(frozen=True)
class Shard:
    """Place of one matrix (or stack of experts' matrices) in the flat buffers of one rank."""

    key: str
    """PEFT's name: base_model.model.<path>.lora_A.weight, or lora_B"""
    path: str
    full_shape: tuple[int, ...]
    axis: Axis
    """what the matrix is split over; "kv": over TP, but into fewer parts than ranks; None where every rank of the stage
    holds the whole"""
    split_dim: int | None
    local_shape: tuple[int, ...]
    """the same on every rank; where the parts do not divide the whole, the last rank's end is padding"""
    offset: int
    copies: int = 1
    """consecutive TP ranks that hold the same part; more than one on the axis "kv" alone"""

    @property
    def size(self) -> int:
        return math.prod(self.local_shape)

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.size].view(self.local_shape)

    def held(self, flat: Tensor, place: Place) -> Tensor:
        """The view without padding: what this rank has of the matrix."""
        if self.split_dim is None:
            return self.view(flat)
        part = self.slice_of(place)[self.split_dim]
        return self.view(flat).narrow(self.split_dim, 0, part.stop - part.start)

    def slice_of(self, place: Place) -> tuple[slice, ...]:
        """The index of this rank's part in the full matrix."""
        if self.split_dim is None:
            return ()
        size, whole = self.local_shape[self.split_dim], self.full_shape[self.split_dim]
        part = place.ep_rank if self.axis == "ep" else place.tp_rank // self.copies
        return (*[slice(None)] * self.split_dim, slice(part * size, min((part + 1) * size, whole)))


def peft_key(path: str, letter: str) -> str:
    """PEFT's name of a matrix; letter is A or B."""
    return f"base_model.model.{path}.lora_{letter}.weight"


def shard_layout(wanted: Iterable[Projection], rank: int, layout: Layout) -> list[Shard]:
    """Where every matrix lies in the flat buffers. The same on every rank of a stage."""
    matrices: list[tuple[str, str, tuple[int, ...], Axis, int | None, int]] = []
    for projection in wanted:
        for letter, shape in (("A", projection.shape_a(rank)), ("B", projection.shape_b(rank))):
            axis, split_dim = _split(projection, letter, shape, layout)
            parts = {None: 1, "tp": layout.tp_size, "kv": projection.heads or 1, "ep": layout.ep_size}[axis]
            matrices.append((peft_key(projection.path, letter), projection.path, shape, axis, split_dim, parts))
    # All A of an axis before its B, and stable otherwise: the A of projections that share an input are neighbours, so
    # that they are one matrix without a copy (lora_training.py).
    matrices.sort(key=lambda matrix: ((None, "kv", "tp", "ep").index(matrix[3]), "lora_B" in matrix[0]))
    shards, offset = [], 0
    for key, path, shape, axis, split_dim, parts in matrices:
        local = tuple(-(-n // parts) if dim == split_dim else n for dim, n in enumerate(shape))
        copies = layout.tp_size // parts if axis == "kv" else 1
        shards.append(Shard(key, path, shape, axis, split_dim, local, offset, copies))
        offset += shards[-1].size
    return shards


def _split(projection: Projection, letter: str, shape: tuple[int, ...], layout: Layout) -> tuple[Axis, int | None]:
    """Axis and dimension; (None, None) for a replicated matrix."""
    if projection.sharding == "expert":
        return ("ep", 0) if layout.ep_size > 1 and shape[0] > 1 else (None, None)
    split_letter, dim = ("B", 0) if projection.sharding == "column" else ("A", 1)
    if layout.tp_size == 1 or letter != split_letter or projection.sharding == "whole":
        return None, None
    return "kv" if projection.heads is not None and projection.heads < layout.tp_size else "tp", dim


class Adapter:
    """A trainable adapter on one rank.

    Attributes:
        weights, grads, exp_avg, exp_avg_sq: float32 [num_local] on the model's device.
        replicated, over_kv, over_tp, over_ep: which entries are equal on all ranks of the stage; equal on `kv_copies`
            consecutive TP ranks; split over TP; over EP.
        step: optimizer steps taken.
        has_gradients: a pass has added to grads since they were last zeroed.
    """

    def __init__(
        self,
        wanted: Sequence[Projection],
        *,
        rank: int,
        alpha: float,
        targets: tuple[str, ...],
        per_expert: bool,
        layout: Layout,
        place: Place,
        device: torch.device,
    ) -> None:
        """`wanted`: the projections of this rank's stage."""
        self.shards = shard_layout(wanted, rank, layout)
        self.place = place
        axes: tuple[Axis, ...] = (None, "kv", "tp", "ep")
        ends = list(accumulate(sum(s.size for s in self.shards if s.axis == axis) for axis in axes))
        self.replicated, self.over_kv, self.over_tp, self.over_ep = (slice(*x) for x in pairwise([0, *ends]))
        self.kv_copies = max((shard.copies for shard in self.shards), default=1)
        self.weights, self.grads, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(ends[-1], dtype=torch.float32, device=device) for _ in range(4)
        )
        self.step = 0
        self.has_gradients = False
        parameters: dict[str, Tensor] = {}
        for shard in self.shards:
            parameter = nn.Parameter(shard.held(self.weights, place))
            parameter.grad = shard.held(self.grads, place)  # autograd adds into an existing gradient in place
            parameters[shard.key] = parameter
        pairs = {
            projection.path: LoraPair(
                parameters[peft_key(projection.path, "A")], parameters[peft_key(projection.path, "B")]
            )
            for projection in wanted
        }
        self.lora = LoraWeights(rank, alpha, targets, pairs, per_expert)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of this stage over all its ranks, replicated ones counted once."""
        return sum(math.prod(shard.full_shape) for shard in self.shards)

    def zero_grad(self) -> None:
        self.grads.zero_()
        self.has_gradients = False

    def restore_grad(self, saved: Tensor | None) -> None:
        """Back to an earlier copy of grads; None means there were none."""
        if saved is None:
            self.zero_grad()
        else:
            self.grads.copy_(saved)

    def initialize(self, seed: int) -> None:
        """A as PEFT draws it (Kaiming uniform with a = sqrt(5): bound 1 / sqrt(d_in)), for experts too; B zero.

        Every matrix has a generator of its own and is drawn whole on the CPU, so the numbers depend on the seed and
        the name only: not on the layout, the device or which other projections are trained.
        """
        with torch.no_grad():
            for shard in self.shards:
                view = shard.held(self.weights, self.place)
                if not shard.key.endswith("lora_A.weight"):
                    view.zero_()
                    continue
                full = torch.empty(shard.full_shape, dtype=torch.float32)
                bound = 1.0 / math.sqrt(shard.full_shape[-1])
                full.uniform_(-bound, bound, generator=_generator(seed, shard.path))
                view.copy_(full[shard.slice_of(self.place)])


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
