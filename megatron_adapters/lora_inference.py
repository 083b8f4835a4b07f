"""LoRA where no gradient is wanted (sampling, forward-only passes): every update is added into the base's output.

The same numbers as lora_linear.py up to the order of additions, with a third of its operations: at decode time a pass
has few rows, and the number of operations is what it costs.

Shapes: as in lora_linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .adapters import LoraPair, LoraWeights
from .lora_stack import Split

if TYPE_CHECKING:
    from .lora_linear import Segment


class Fused(NamedTuple):
    """What one linear computes: several projections in one output."""

    paths: tuple[str, ...]
    split: Split
    out_size: int
    """O, on this rank"""

    def columns(self) -> list[slice] | None:
        """Of O, by path; None where some projection's lie in groups."""
        views = self.split(torch.empty(1, self.out_size))
        if any(view.ndim != 2 for view in views):
            return None
        return [slice(view.storage_offset(), view.storage_offset() + view.shape[1]) for view in views]


class Update(NamedTuple):
    """What one adapter adds to the projections of one fused linear."""

    a_IW: Tensor
    """(alpha / rank) * A^T of all of them, side by side"""
    up: tuple[tuple[slice, slice, Tensor], ...]
    """products that together make the update: columns of O, columns of W, B^T of these"""

    @property
    def num_bytes(self) -> int:
        return self.a_IW.nbytes + sum(b_RO.nbytes for _, _, b_RO in self.up)


def update_of(lora: LoraWeights | None, fused: Fused, dtype: torch.dtype) -> Update | None:
    """None where the adapter has none of these projections. Kept where it cannot change, that is for a snapshot.

    Copied as the products read it, which for a snapshot's A and B is as much memory as they are: the updates of a
    decode step of 12 x 512, 32 rows, then take 5 ms instead of 7 ms (one thread of an Intel Xeon).
    """
    if lora is None:
        return None
    if fused.paths in lora.kept:
        return lora.kept[fused.paths]
    adapted = [(place, lora.pairs[path]) for place, path in enumerate(fused.paths) if path in lora.pairs]
    update = None
    if adapted:
        a_WI = torch.cat([pair.a for _, pair in adapted]).to(dtype) * lora.scaling
        update = Update(a_WI.t().contiguous(), _up(adapted, lora.rank, fused, dtype))
    if not any(pair.a.requires_grad for _, pair in adapted):
        lora.kept[fused.paths] = update
    return update


def _up(
    adapted: Sequence[tuple[int, LoraPair]], rank: int, fused: Fused, dtype: torch.dtype
) -> tuple[tuple[slice, slice, Tensor], ...]:
    columns, own = fused.columns(), [slice(n * rank, (n + 1) * rank) for n in range(len(adapted))]
    if columns is not None:
        return tuple(
            (columns[place], rows, pair.b.to(dtype).t().contiguous())
            for (place, pair), rows in zip(adapted, own, strict=True)
        )
    # Queries, keys and values in groups: one product with zeros between them, not three whose results are then copied.
    b_WO = torch.zeros(len(adapted) * rank, fused.out_size, dtype=dtype, device=adapted[0][1].b.device)
    for (place, pair), rows in zip(adapted, own, strict=True):
        places = fused.split(b_WO[rows])[place]
        places.copy_(pair.b.to(dtype).t().reshape(places.shape))
    return ((slice(0, fused.out_size), slice(0, len(b_WO)), b_WO),)


def add_update_(out_TO: Tensor, x_TI: Tensor, segments: Sequence[Segment], fused: Fused) -> None:
    """Add each segment's update to its rows of the fused output, in place; nothing crosses ranks."""
    for lora, start, end in segments:
        update = update_of(lora, fused, x_TI.dtype)
        if update is not None:
            x_NI, out_NO = (x_TI, out_TO) if len(segments) == 1 else (x_TI[start:end], out_TO[start:end])
            _add_up_(out_NO, torch.mm(x_NI, update.a_IW), update)


def project_down(x_LI: Tensor, segments: Sequence[Segment], fused: Fused, width: int) -> Tensor:
    """(alpha / rank) * x A^T of every path, side by side, zero beyond a segment's own columns: [L, W]."""
    # Zeros, since under tensor parallelism all columns travel: uninitialised memory may be slow to add (denormals).
    h_LW = x_LI.new_zeros(x_LI.shape[0], width)
    for lora, start, end in segments:
        update = update_of(lora, fused, x_LI.dtype)
        if update is not None:
            h_LW[start:end, : update.a_IW.shape[1]] = torch.mm(x_LI[start:end], update.a_IW)
    return h_LW


def add_up_(out_TO: Tensor, h_TW: Tensor, segments: Sequence[Segment], fused: Fused) -> None:
    """Add h B^T of every path to its part of the fused output, in place."""
    for lora, start, end in segments:
        update = update_of(lora, fused, h_TW.dtype)
        if update is not None:
            _add_up_(out_TO[start:end], h_TW[start:end, : update.a_IW.shape[1]], update)


def _add_up_(out_NO: Tensor, h_NW: Tensor, update: Update) -> None:
    for columns, own, b_RO in update.up:
        if len(update.up) == 1 and b_RO.shape[1] == out_NO.shape[1]:
            out_NO.addmm_(h_NW, b_RO)
        else:
            out_NO[:, columns].addmm_(h_NW[:, own], b_RO)
