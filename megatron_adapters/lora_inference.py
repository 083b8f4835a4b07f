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

from .adapters import LoraWeights

if TYPE_CHECKING:
    from .lora_linear import Segment


class Update(NamedTuple):
    """What one adapter adds to the projections of one fused linear."""

    a_IW: Tensor
    """(alpha / rank) * A^T of all of them, side by side"""
    parts: tuple[tuple[int, slice, Tensor], ...]
    """for each adapted projection: its place among the paths, its columns of W, B^T [rank, O_p]"""


def update_of(lora: LoraWeights | None, paths: tuple[str, ...], dtype: torch.dtype) -> Update | None:
    """None where the adapter has none of these projections. Kept where it cannot change, that is for a snapshot."""
    if lora is None:
        return None
    if paths in lora.kept:
        return lora.kept[paths]
    adapted = [(place, lora.pairs[path]) for place, path in enumerate(paths) if path in lora.pairs]
    update = None
    if adapted:
        a_WI = torch.cat([pair.a for _, pair in adapted]).to(dtype) * lora.scaling
        parts = [
            (place, slice(number * lora.rank, (number + 1) * lora.rank), pair.b.to(dtype).t())
            for number, (place, pair) in enumerate(adapted)
        ]
        update = Update(a_WI.t(), tuple(parts))
    if not any(pair.a.requires_grad for _, pair in adapted):
        lora.kept[paths] = update
    return update


def add_update_(parts: Sequence[Tensor], x_TI: Tensor, segments: Sequence[Segment], paths: tuple[str, ...]) -> None:
    """Add each segment's update to its rows of the fused output, in place; nothing crosses ranks.

    Args: parts: for each path a view of the output, [T, O_p] or with O_p cut into groups, [T, groups, O_p / groups].
    """
    for lora, start, end in segments:
        update = update_of(lora, paths, x_TI.dtype)
        if update is not None:
            h_NW = torch.mm(x_TI[start:end] if len(segments) > 1 else x_TI, update.a_IW)
            _add_up_(parts, h_NW, update, start, end)


def project_down(x_LI: Tensor, segments: Sequence[Segment], paths: tuple[str, ...], width: int) -> Tensor:
    """(alpha / rank) * x A^T of every path, side by side, zero beyond a segment's own columns: [L, W]."""
    # Zeros, since under tensor parallelism all columns travel: uninitialised memory may be slow to add (denormals).
    h_LW = x_LI.new_zeros(x_LI.shape[0], width)
    for lora, start, end in segments:
        update = update_of(lora, paths, x_LI.dtype)
        if update is not None:
            h_LW[start:end, : update.a_IW.shape[1]] = torch.mm(x_LI[start:end], update.a_IW)
    return h_LW


def add_up_(parts: Sequence[Tensor], h_TW: Tensor, segments: Sequence[Segment], paths: tuple[str, ...]) -> None:
    """Add h B^T of every path to its part of the fused output, in place; parts as for add_update_."""
    for lora, start, end in segments:
        update = update_of(lora, paths, h_TW.dtype)
        if update is not None:
            _add_up_(parts, h_TW[start:end], update, start, end)


def _add_up_(parts: Sequence[Tensor], h_NW: Tensor, update: Update, start: int, end: int) -> None:
    for place, columns, b_RO in update.parts:
        rows = parts[place][start:end]
        if rows.ndim == 2:
            rows.addmm_(h_NW[:, columns], b_RO)
        else:
            rows.add_(torch.mm(h_NW[:, columns], b_RO).view_as(rows))
