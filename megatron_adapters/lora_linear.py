"""LoRA beside megatron-core's parallel linears: y = base(x) + (alpha / rank) * (x A^T) B^T, Hu et al. 2021,
arXiv:2106.09685, section 4.1. While B is zero the output equals the base's, bit for bit.

The tokens of a forward are cut into contiguous *segments*, each with its own adapter or none; ranks and target sets
may differ. A `Routing`, shared by all wrapped linears of a model, says which; it is set once per forward.

Tensor parallelism (always with sequence parallelism when tp_size > 1):
  column  A sees this rank's tokens only; the [tokens, rank] result is gathered, then B gives this rank's outputs.
  row     A gives partial sums over this rank's inputs; they are reduce-scattered, then B sees this rank's tokens.
  whole   every rank holds W, A and B, and sees its own tokens: nothing travels.
So only `rank` columns travel, never activations; and the gradient of every replicated matrix (column A, row B) is a
partial sum over TP (of a whole matrix both), which grad_sync.py adds up.

Shapes: T all tokens, L this rank's tokens (T / tp_size), I inputs, O outputs, W padded width (sum of ranks), P paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from . import lora_inference, lora_training
from .adapters import LoraPair, LoraWeights
from .frozen_linear import frozen_linear
from .routing_replay import Given


class Segment(NamedTuple):
    """Tokens start..end-1 of a packed forward use `lora`, or the base alone."""

    lora: LoraWeights | None
    start: int
    end: int

    def pairs(self, paths: Sequence[str]) -> list[LoraPair | None]:
        return [self.lora.pairs.get(path) if self.lora else None for path in paths]

    def width(self, paths: Sequence[str]) -> int:
        return sum(self.lora.rank for pair in self.pairs(paths) if pair and self.lora)


class Routes(NamedTuple):
    """See Routing.use."""

    all: tuple[Segment, ...] = ()
    local: tuple[Segment, ...] = ()
    """of this rank's share of the tokens"""
    table: tuple[LoraWeights | None, ...] = ()
    given: Given | None = None
    """of this rank's share"""


class Routing:
    """Which segment of the tokens belongs to which adapter, during one forward; and to which experts they go.

    Attributes: noted: what routers choose, by the layer's place; None where nobody wants to know (routing_replay.py).
    """

    noted: dict[int, Tensor] | None = None

    def __init__(self, tp_rank: int, tp_size: int) -> None:
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self._set(Routes())

    def _set(self, routes: Routes) -> None:
        self.routes = routes
        self.all, self.local, self.table, self.given = routes
        self._numbers_L: Tensor | None = None

    @contextmanager
    def use(
        self,
        segments: Sequence[Segment],
        num_tokens: int,
        table: Sequence[LoraWeights | None] | None = None,
        given: Given | None = None,
    ) -> Iterator[None]:
        """Route the forward inside the `with`.

        Args:
            segments: must tile 0..num_tokens, a multiple of tp_size, in order.
            table: every adapter (None: the base alone) that the ranks sharing experts with this one may use in this
                forward, the same list on all of them: tokens travel to experts with their adapter's place in it. None:
                those of the segments, where the ranks that share experts have the same segments.
            given: the experts that the tokens go through; None: those that the routers choose.
        """
        check_tiling(segments, num_tokens)
        share = num_tokens // self.tp_size
        start, end = self.tp_rank * share, (self.tp_rank + 1) * share
        local = clip_segments(segments, start, end)
        if table is None:
            table = list({id(segment.lora): segment.lora for segment in segments}.values())
        own = None if given is None else given.share(start, end)
        with self.as_it_was(Routes(tuple(segments), tuple(local), tuple(table), own)):
            yield

    @contextmanager
    def as_it_was(self, routes: Routes) -> Iterator[None]:
        """Route as during an earlier `use`: a layer that is computed again for its backward."""
        before = self.routes
        self._set(routes)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def noting(self) -> Iterator[dict[int, Tensor]]:
        """Note what the routers of the forward inside the `with` choose: by place, int64 [L, K]."""
        self.noted = {}
        try:
            yield self.noted
        finally:
            self.noted = None

    def adapts(self, paths: Sequence[str]) -> bool:
        return any(segment.lora and path in segment.lora.pairs for segment in self.all for path in paths)

    def local_numbers(self, device: torch.device) -> Tensor:
        """Place in the table of each of this rank's tokens' adapters, int64 [L]."""
        if self._numbers_L is None:
            place = {id(lora): number for number, lora in enumerate(self.table)}
            numbers = torch.tensor([place[id(segment.lora)] for segment in self.local])
            lengths = torch.tensor([segment.end - segment.start for segment in self.local])
            self._numbers_L = numbers.repeat_interleave(lengths).to(device)
        return self._numbers_L


def check_tiling(segments: Sequence[Segment], num_tokens: int) -> None:
    """An internal check: a gap would silently shift every later token to another adapter."""
    position = 0
    for segment in segments:
        assert segment.start == position <= segment.end, f"segments leave a gap at token {position}: {segment}"
        position = segment.end
    assert position == num_tokens, f"segments end at {position}, the forward has {num_tokens} tokens"


def clip_segments(segments: Sequence[Segment], start: int, end: int) -> list[Segment]:
    """The parts of the segments inside start..end, counted from `start`; empty parts are dropped."""
    parts = [Segment(lora, max(s, start) - start, min(e, end) - start) for lora, s, e in segments]
    return [part for part in parts if part.end > part.start]


class LoraLinear(nn.Module):
    """A frozen Column- or RowParallelLinear with the adapters of the projections it fuses.

    Args:
        base: called as base(x) -> (output, bias).
        paths: Hugging Face paths of the fused projections, in the order of `split`.
        sharding: "column", "row" or "whole".
        split: the part of each projection in the base's fused layout [T, O], as views: [T, O_p] or
            [T, groups, O_p / groups].
    """

    def __init__(
        self,
        base: nn.Module,
        paths: Sequence[str],
        *,
        sharding: str,
        split: Callable[[Tensor], list[Tensor]],
        routing: Routing,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.base = base
        self.paths = tuple(paths)
        self.column, self.row = sharding == "column", sharding == "row"
        self.split = split
        frozen: Any = base
        self._fused = lora_inference.Fused(self.paths, split, frozen.weight.shape[0])
        self.routing = routing
        self.tp_group = tp_group

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [L, 1, I] (column) or [T, 1, I / tp_size] (row) -> ([T, 1, O / tp_size] or [L, 1, O], bias).

        Collectives: the base's, then over the TP group one all-gather (column) or one reduce-scatter (row) of
        [T, W], and the mirror image in backward; none where no segment adapts these projections.
        """
        if not torch.is_grad_enabled():
            return self.infer(x[:, 0])[:, None], None
        adapts = self.routing.adapts(self.paths)
        if self.tp_group.size() == 1:
            return self._alone(x, adapts=adapts)
        base: Any = self.base
        out, bias = base(x)
        if not adapts:
            return out, bias
        down = self.routing.all if self.row else self.routing.local
        up = self.routing.all if self.column else self.routing.local
        width = max(segment.width(self.paths) for segment in self.routing.all)
        h_W = lora_training.project_down(x[:, 0], lora_training.parts_of(down, self.paths), width)
        if not h_W.requires_grad:  # zeros, where no local token's adapter has these projections: see below
            h_W.requires_grad_()
        if self.column:
            h_W = gather_from_sequence_parallel_region(h_W, tensor_parallel_output_grad=True, group=self.tp_group)
        elif self.row:
            h_W = reduce_scatter_to_sequence_parallel_region(h_W, group=self.tp_group)
        # The mirror image in backward is a collective too: every TP rank comes to it, whoever's tokens it has.
        return lora_training.add_up(out, h_W, self.split, lora_training.parts_of(up, self.paths)), bias

    def _alone(self, x: Tensor, *, adapts: bool) -> tuple[Tensor, Tensor | None]:
        """forward without tensor parallelism."""
        base: Any = self.base
        now, later = (None, base.bias) if base.skip_bias_add else (base.bias, None)
        if not adapts:
            return frozen_linear(x[:, 0], base.weight, now)[:, None], later
        frozen = lora_training.Frozen(base.weight, now)
        out = lora_training.adapted_linear(x[:, 0], frozen, self.routing.all, self.paths, self.split)
        return out[:, None], later

    def infer(self, x_LI: Tensor, plus_LO: Tensor | None = None) -> Tensor:
        """The whole output without gradients, bias included: [L, I] -> [T, O / tp_size] (column), [T, I / tp_size] ->
        [L, O] (row). `plus_LO` is added to it. Updates are added in place; collectives as in forward.
        """
        base: Any = self.base
        alone = self.tp_group.size() == 1
        if alone:
            out = frozen_linear(x_LI, base.weight, base.bias, plus_LO)
        else:
            out, bias = base(x_LI[:, None])
            out = out[:, 0]
            for more in (bias, plus_LO):
                out = out if more is None else out + more
        if not self.routing.adapts(self.paths):
            return out
        if alone:
            lora_inference.add_update_(out, x_LI, self.routing.all, self._fused)
            return out
        down = self.routing.all if self.row else self.routing.local
        up = self.routing.all if self.column else self.routing.local
        width = max(segment.width(self.paths) for segment in self.routing.all)
        h_W = lora_inference.project_down(x_LI, down, self._fused, width)
        if self.column:
            h_W = gather_from_sequence_parallel_region(h_W, group=self.tp_group)
        elif self.row:
            h_W = reduce_scatter_to_sequence_parallel_region(h_W, group=self.tp_group)
        lora_inference.add_up_(out, h_W, up, self._fused)
        return out
