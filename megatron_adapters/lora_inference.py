"""LoRA where no gradient is wanted (sampling, forward-only passes): every update is added into the base's output.

The same numbers as lora_linear.py up to the order of additions, with a third of its operations: at decode time a pass
has few rows, and the number of operations is what it costs.

Shapes: as in lora_linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .lora_linear import Segment


def project_down(x_LI: Tensor, segments: Sequence[Segment], paths: tuple[str, ...], width: int) -> Tensor:
    """(alpha / rank) * x A^T of every path, side by side: [L, W]; columns beyond a segment's own are undefined."""
    if len(segments) == 1 and segments[0].lora is not None and segments[0].width(paths) == width:
        h_LW = F.linear(x_LI, segments[0].lora.stacked_a(paths, x_LI.dtype))
        return h_LW if segments[0].lora.scaling == 1 else h_LW.mul_(segments[0].lora.scaling)
    # Zeros, since under tensor parallelism all columns travel: uninitialised memory may be slow to add (denormals).
    h_LW = x_LI.new_zeros(x_LI.shape[0], width)
    for segment in segments:
        if own := segment.width(paths):
            assert segment.lora is not None
            a_WI = segment.lora.stacked_a(paths, x_LI.dtype)
            part = torch.mm(x_LI[segment.start : segment.end], a_WI.t())
            torch.mul(part, segment.lora.scaling, out=h_LW[segment.start : segment.end, :own])
    return h_LW


def add_up_(parts: Sequence[Tensor], h_TW: Tensor, segments: Sequence[Segment], paths: tuple[str, ...]) -> None:
    """Add h B^T of every path to its part of the fused output, in place.

    Args: parts: for each path a view of the output, [T, O_p] or with O_p cut into groups, [T, groups, O_p / groups].
    """
    for segment in segments:
        column = 0
        for part, pair in zip(parts, segment.pairs(paths), strict=True):
            if pair is None or segment.lora is None:
                continue
            rows = part[segment.start : segment.end]
            h_TR = h_TW[segment.start : segment.end, column : column + segment.lora.rank]
            column += segment.lora.rank
            b_RO = pair.b.to(h_TR.dtype).t()
            if rows.ndim == 2:
                rows.addmm_(h_TR, b_RO)
            else:
                rows.add_(torch.mm(h_TR, b_RO).view_as(rows))
