"""LoRA where gradients are wanted: the updates of all adapters in a fused linear as one node of autograd's graph.

What eight adapters cost beside one is not their products, which are as many operations on the same tokens, but what
stands around them: a graph of slices, each with a gradient as large as the whole batch, and gradients of all matrices
that are made and then added to those of before. So the forward adds every update into the base's output in place, and
the backward adds every product into the matrix's own gradient (as Megatron's fused gradient accumulation does).

Shapes: as in lora_linear.py; N tokens of one segment, R its adapter's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .frozen_linear import frozen_linear_grad, frozen_product
from .row_products import add_product_, linear_grad, linear_without_graph, product

if TYPE_CHECKING:
    from .lora_linear import Segment

Split = Callable[[Tensor], list[Tensor]]
"""The part of each projection in a fused output, as views: [T, O_p] or [T, groups, O_p / groups]."""


class Part(NamedTuple):
    """What one segment's adapter adds to the projections of one fused linear."""

    start: int
    end: int
    scaling: float
    rank: int
    places: tuple[int, ...]
    """of its adapted projections among the paths"""
    a_RI: tuple[Tensor, ...]
    b_OR: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        return self.rank * len(self.places)


def parts_of(segments: Sequence[Segment], paths: Sequence[str]) -> list[Part]:
    """Of the segments that adapt any of the paths."""
    parts = []
    for segment in segments:
        pairs = segment.pairs(paths)
        adapted = [(place, pair) for place, pair in enumerate(pairs) if pair is not None]
        if adapted and segment.lora is not None and segment.end > segment.start:
            places, of_part = zip(*adapted, strict=True)
            a, b = zip(*of_part, strict=True)
            parts.append(Part(segment.start, segment.end, segment.lora.scaling, segment.lora.rank, places, a, b))
    return parts


class Frozen(NamedTuple):
    """The linear itself."""

    weight_OI: Tensor
    bias_O: Tensor | None


def adapted_linear(
    x_TI: Tensor, frozen: Frozen, segments: Sequence[Segment], paths: Sequence[str], split: Split
) -> Tensor:
    """x W^T + bias, and to each segment's rows (alpha / rank) (x A^T) B^T, where nothing crosses ranks: [T, O].
    Differentiable in x; the gradients of A and B are added to what they have (`.grad`) in the backward.

    Args: split: see LoraLinear.
    """
    parts = parts_of(segments, paths)
    return _AdaptedLinear.apply(x_TI, frozen, split, parts, *(m for part in parts for m in (*part.a_RI, *part.b_OR)))  # type: ignore[no-any-return]


def project_down(x_LI: Tensor, parts: list[Part], width: int) -> Tensor:
    """(alpha / rank) * x A^T of every path, side by side, zero beyond a segment's own columns: [L, W]."""
    return _Down.apply(x_LI, parts, width, *(a for part in parts for a in part.a_RI))  # type: ignore[no-any-return]


def add_up(out: Tensor, h_TW: Tensor, split: Split, parts: list[Part]) -> Tensor:
    """The fused output [T, 1, O] plus h B^T of every path; `out` itself, changed in place."""
    return _Up.apply(out, h_TW, split, parts, *(b for part in parts for b in part.b_OR))  # type: ignore[no-any-return]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, frozen: Frozen, split: Split, parts: list[Part], *matrices: Tensor) -> Tensor:
        out_TO = frozen_product(x_TI, frozen.weight_OI, frozen.bias_O)
        kept = []
        for part, outs in zip(parts, _rows(split(out_TO), parts), strict=True):
            kept.append(_down(x_TI[part.start : part.end], part))
            _add_up_(outs, kept[-1], part)
        # Not by save_for_backward: of the matrices recomputation would hand back copies, without a gradient to add to.
        ctx.weight_OI, ctx.split, ctx.parts = frozen.weight_OI, split, parts
        ctx.save_for_backward(x_TI, *kept)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *kept = ctx.saved_tensors
        parts: list[Part] = ctx.parts
        grad_TO = grads[0]
        x_grad_TI = frozen_linear_grad(grad_TO, ctx.weight_OI) if ctx.needs_input_grad[0] else None
        for part, h_NW, outs in zip(parts, kept, _rows(ctx.split(grad_TO), parts), strict=True):
            h_grad_NW = _up_backward(outs, h_NW, part)
            here = slice(part.start, part.end)
            _down_backward(h_grad_NW, x_TI[here], part, None if x_grad_TI is None else x_grad_TI[here])
        return (x_grad_TI, *[None] * (len(ctx.needs_input_grad) - 1))


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LI: Tensor, parts: list[Part], width: int, *matrices: Tensor) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(x_LI)
        # Zeros, since all columns travel: uninitialised memory may be slow to add (denormals).
        h_LW = x_LI.new_zeros(x_LI.shape[0], width)
        for part in parts:
            h_LW[part.start : part.end, : part.width] = _down(x_LI[part.start : part.end], part)
        return h_LW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_LI,) = ctx.saved_tensors
        x_grad_LI = torch.zeros_like(x_LI) if ctx.needs_input_grad[0] else None
        for part in ctx.parts:
            here = slice(part.start, part.end)
            h_grad_NW = grads[0][here, : part.width].contiguous()
            _down_backward(h_grad_NW, x_LI[here], part, None if x_grad_LI is None else x_grad_LI[here])
        return (x_grad_LI, *[None] * (len(ctx.needs_input_grad) - 1))


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, h_TW: Tensor, split: Split, parts: list[Part], *matrices: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        ctx.split, ctx.parts = split, parts
        ctx.save_for_backward(h_TW)
        for part, outs in zip(parts, _rows(split(out[:, 0]), parts), strict=True):
            _add_up_(outs, h_TW[part.start : part.end, : part.width], part)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h_TW,) = ctx.saved_tensors
        h_grad_TW = torch.zeros_like(h_TW)
        for part, outs in zip(ctx.parts, _rows(ctx.split(grads[0][:, 0]), ctx.parts), strict=True):
            here = (slice(part.start, part.end), slice(part.width))
            h_grad_TW[here] = _up_backward(outs, h_TW[here], part)
        return (grads[0], h_grad_TW, *[None] * (len(ctx.needs_input_grad) - 2))


def _rows(views: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]]:
    """Of each part: its rows in the projections it adapts."""
    return [[views[place][part.start : part.end] for place in part.places] for part in parts]


def _down(x_NI: Tensor, part: Part) -> Tensor:
    """[N, W]; the scaling is applied here, to `rank` columns, and not to the wide output."""
    return linear_without_graph(x_NI, stacked(part.a_RI).to(x_NI.dtype)).mul_(part.scaling)


def _add_up_(outs: Sequence[Tensor], h_NW: Tensor, part: Part) -> None:
    for out, h_NR, b_OR in zip(outs, h_NW.split(part.rank, dim=1), part.b_OR, strict=True):
        b_RO = b_OR.to(h_NR.dtype).t()
        if out.ndim == 2:
            add_product_(out, h_NR, b_RO)
        else:
            out.add_(product(h_NR, b_RO).view_as(out))


def _up_backward(grad_outs: Sequence[Tensor], h_NW: Tensor, part: Part) -> Tensor:
    """The gradient by h, [N, W]; those by B are added to what they have."""
    pieces = []
    for grad, h_NR, b_OR in zip(grad_outs, h_NW.split(part.rank, dim=1), part.b_OR, strict=True):
        grad_NO = grad.reshape(grad.shape[0], -1).contiguous()
        pieces.append(linear_grad(grad_NO, b_OR.to(grad_NO.dtype)))
        _add_product_([b_OR], grad_NO.t(), h_NR)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _down_backward(h_grad_NW: Tensor, x_NI: Tensor, part: Part, x_grad_NI: Tensor | None) -> None:
    """Add to the gradients by x and A, in place."""
    h_grad_NW = h_grad_NW.mul_(part.scaling)
    if x_grad_NI is not None:
        add_product_(x_grad_NI, h_grad_NW, stacked(part.a_RI).to(x_grad_NI.dtype))
    _add_product_(part.a_RI, h_grad_NW.t(), x_NI)


def _add_product_(matrices: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
    """Add left @ right to the gradient of the matrices, one above the other, where they want one."""
    if not matrices[0].requires_grad:
        return
    for matrix in matrices:
        if matrix.grad is None:
            matrix.grad = torch.zeros_like(matrix)
    into = [matrix.grad for matrix in matrices if matrix.grad is not None]
    whole = as_one(into)
    rows = [left] if whole is not None else left.split([len(x) for x in into])
    for grad, piece in zip([whole] if whole is not None else into, rows, strict=True):
        if grad.dtype == left.dtype:
            grad.addmm_(piece, right)
        else:
            grad.add_(torch.mm(piece, right))


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """One above the other; a view where they lie so in memory, as an adapter's A do (adapters.py)."""
    whole = as_one(matrices)
    return torch.cat([x.detach() for x in matrices]) if whole is None else whole


def as_one(matrices: Sequence[Tensor]) -> Tensor | None:
    """Contiguous matrices of equal width that follow one another in one buffer, as one view; None where they do not."""
    first = matrices[0].detach()
    if len(matrices) == 1:
        return first
    end = first.data_ptr()
    for matrix in matrices:
        if matrix.data_ptr() != end or not matrix.is_contiguous() or matrix.shape[1] != first.shape[1]:
            return None
        end += matrix.numel() * matrix.element_size()
    if any(x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for x in matrices):
        return None
    return first.as_strided((sum(len(x) for x in matrices), first.shape[1]), first.stride())
