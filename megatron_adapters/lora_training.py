"""LoRA where gradients are wanted: the updates of all adapters in a fused linear as one node of autograd's graph.

What eight adapters cost beside one is not their products, which are as many operations on the same tokens, but what
stands around them: a graph of slices, each with a gradient as large as the whole batch, and gradients of all matrices
that are made and then added to those of before. So the forward adds every update into the base's output in place, and
the backward adds every product into the matrix's own gradient (as Megatron's fused gradient accumulation does). The
factor alpha / rank goes with the products that are added, where it costs nothing. On a GPU several adapters are grouped
instead (lora_grouped.py), but for tensor parallelism.

Shapes: as in lora_linear.py; N tokens of one segment, R its adapter's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import lora_grouped
from .frozen_linear import frozen_linear, frozen_linear_grad, frozen_product
from .lora_stack import Split, Stack, add_gradient_, stack_of
from .row_products import add_product_, linear_grad, linear_without_graph

if TYPE_CHECKING:
    from .lora_linear import Segment


class Part(NamedTuple):
    """Tokens start..end-1, and what their adapter adds to the projections of one fused linear."""

    start: int
    end: int
    stack: Stack


def parts_of(segments: Sequence[Segment], paths: tuple[str, ...]) -> list[Part]:
    """Of the segments that adapt any of the paths."""
    parts = []
    for lora, start, end in segments:
        if lora is not None and end > start:
            stack = stack_of(lora, paths)
            if stack.places:
                parts.append(Part(start, end, stack))
    return parts


class Frozen(NamedTuple):
    """The linear itself."""

    weight_OI: Tensor
    bias_O: Tensor | None


def adapted_linear(
    x_TI: Tensor, frozen: Frozen, segments: Sequence[Segment], paths: tuple[str, ...], split: Split
) -> Tensor:
    """x W^T + bias, and to each segment's rows (alpha / rank) (x A^T) B^T, where nothing crosses ranks: [T, O].
    Differentiable in x; the gradients of A and B are added to what they have (`.grad`) in the backward.

    Args: split: see LoraLinear.
    """
    parts = parts_of(segments, paths)
    matrices = [matrix for part in parts for matrix in (*part.stack.a_RI, *part.stack.b_OR)]
    if lora_grouped.is_better(x_TI, frozen.weight_OI, len(parts)):
        out_TO = frozen_linear(x_TI, frozen.weight_OI, frozen.bias_O)
        plan = lora_grouped.make_plan(parts, len(paths), x_TI)
        return lora_grouped.Updates.apply(out_TO, x_TI, plan, split, *matrices)  # type: ignore[no-any-return]
    return _AdaptedLinear.apply(x_TI, frozen, split, parts, *matrices)  # type: ignore[no-any-return]


def project_down(x_LI: Tensor, parts: list[Part], width: int) -> Tensor:
    """x A^T of every path, side by side, zero beyond a segment's own columns: [L, W]."""
    return _Down.apply(x_LI, parts, width, *(a_RI for part in parts for a_RI in part.stack.a_RI))  # type: ignore[no-any-return]


def add_up(out: Tensor, h_TW: Tensor, split: Split, parts: list[Part]) -> Tensor:
    """The fused output [T, 1, O] plus (alpha / rank) * h B^T of every path; `out` itself, changed in place."""
    return _Up.apply(out, h_TW, split, parts, *(b_OR for part in parts for b_OR in part.stack.b_OR))  # type: ignore[no-any-return]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, frozen: Frozen, split: Split, parts: list[Part], *matrices: Tensor) -> Tensor:
        out_TO = frozen_product(x_TI, frozen.weight_OI, frozen.bias_O)
        kept = [_down(x_TI[start:end], stack) for start, end, stack in parts]
        _add_up_(split(out_TO), kept, parts)
        # Not by save_for_backward: of the matrices recomputation would hand back copies, without a gradient to add to.
        ctx.weight_OI, ctx.split, ctx.parts = frozen.weight_OI, split, parts
        ctx.save_for_backward(x_TI, *kept)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *kept = ctx.saved_tensors
        grad_TO = grads[0]
        x_grad_TI = frozen_linear_grad(grad_TO, ctx.weight_OI) if ctx.needs_input_grad[0] else None
        h_grads = _up_backward(ctx.split(grad_TO), kept, ctx.parts)
        _down_backward(h_grads, x_TI, ctx.parts, x_grad_TI)
        return (x_grad_TI, *[None] * (len(ctx.needs_input_grad) - 1))


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LI: Tensor, parts: list[Part], width: int, *matrices: Tensor) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(x_LI)
        # Zeros, since all columns travel: uninitialised memory may be slow to add (denormals).
        h_LW = x_LI.new_zeros(x_LI.shape[0], width)
        for here, part in zip(_of_parts(h_LW, parts), parts, strict=True):
            here.copy_(_down(x_LI[part.start : part.end], part.stack))
        return h_LW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_LI,) = ctx.saved_tensors
        x_grad_LI = torch.zeros_like(x_LI) if ctx.needs_input_grad[0] else None
        h_grads = [h_grad_NW.contiguous() for h_grad_NW in _of_parts(grads[0], ctx.parts)]
        _down_backward(h_grads, x_LI, ctx.parts, x_grad_LI)
        return (x_grad_LI, *[None] * (len(ctx.needs_input_grad) - 1))


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, h_TW: Tensor, split: Split, parts: list[Part], *matrices: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        ctx.split, ctx.parts = split, parts
        ctx.save_for_backward(h_TW)
        _add_up_(split(out[:, 0]), _of_parts(h_TW, parts), parts)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h_TW,) = ctx.saved_tensors
        h_grad_TW = torch.zeros_like(h_TW)
        h_grads = _up_backward(ctx.split(grads[0][:, 0]), _of_parts(h_TW, ctx.parts), ctx.parts)
        for here, h_grad_NW in zip(_of_parts(h_grad_TW, ctx.parts), h_grads, strict=True):
            here.copy_(h_grad_NW)
        return (grads[0], h_grad_TW, *[None] * (len(ctx.needs_input_grad) - 2))


def _of_parts(h_TW: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Each part's rows, and its own columns of them."""
    return [h_TW[start:end, : stack.width] for start, end, stack in parts]


def _down(x_NI: Tensor, stack: Stack) -> Tensor:
    """[N, W], not scaled yet."""
    return linear_without_graph(x_NI, stack.a_WI(x_NI.dtype))


def _add_up_(outs: Sequence[Tensor], kept: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Add every part's update to its rows of the projections `outs`."""
    # A projection whose columns lie in groups gets all updates in one addition.
    updates = [out if out.ndim == 2 else out.new_zeros(out.shape[0], out[0].numel()) for out in outs]
    for h_NW, (start, end, stack) in zip(kept, parts, strict=True):
        for place, h_NR, b_RO in zip(stack.places, _by_projection(h_NW, stack), stack.b_RO(h_NW.dtype), strict=True):
            add_product_(updates[place][start:end], h_NR, b_RO, stack.scaling)
    for out, update in zip(outs, updates, strict=True):
        if out is not update:
            out.add_(update.view_as(out))


def _up_backward(grad_outs: Sequence[Tensor], kept: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """Of each part the gradient by h, [N, W], not scaled yet; those by B are added to what they have."""
    grads_TO = [grad.flatten(1) for grad in grad_outs]
    h_grads = []
    for h_NW, (start, end, stack) in zip(kept, parts, strict=True):
        pieces = []
        of_projections = zip(stack.places, _by_projection(h_NW, stack), stack.b_OR, stack.b_RO(h_NW.dtype), strict=True)
        for place, h_NR, b_OR, b_RO in of_projections:
            grad_NO = grads_TO[place][start:end]
            pieces.append(linear_grad(grad_NO, b_RO))
            add_gradient_(b_OR, grad_NO, h_NR, stack.scaling)
        h_grads.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1))
    return h_grads


def _down_backward(h_grads: Sequence[Tensor], x_TI: Tensor, parts: Sequence[Part], x_grad_TI: Tensor | None) -> None:
    """Add to the gradients by x and A, in place."""
    for h_grad_NW, (start, end, stack) in zip(h_grads, parts, strict=True):
        if x_grad_TI is not None:
            add_product_(x_grad_TI[start:end], h_grad_NW, stack.a_WI(x_TI.dtype), stack.scaling)
        stack.add_gradient_of_a(h_grad_NW, x_TI[start:end])


def _by_projection(h_NW: Tensor, stack: Stack) -> Sequence[Tensor]:
    return (h_NW,) if len(stack.places) == 1 else h_NW.chunk(len(stack.places), 1)
