"""A frozen linear and its LoRA as one differentiable function, where every rank has the whole of both (no TP).

Autograd makes a tensor of every update, of the updates laid out as the base's output, of base plus update, and in
backward of each of the gradients that x gets; here all of them are added in the matrix products themselves, in place.

Shapes: T tokens, N those of a segment, I inputs, O outputs, W all ranks side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .frozen_linear import frozen_linear_grad, frozen_product

if TYPE_CHECKING:
    from .lora_linear import Segment

Split = Callable[[Tensor], list[Tensor]]


class Frozen(NamedTuple):
    """The linear itself."""

    weight_OI: Tensor
    bias_O: Tensor | None


class _Adapted(NamedTuple):
    """The projections of a linear that one adapter has."""

    scaling: float
    places: tuple[int, ...]
    """among the paths"""
    columns: tuple[slice, ...]
    """of W"""
    first: int
    """place of the first A among all matrices; then come the other A, then the B"""

    def of(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A of all, [W, I], and each B [O_p, rank]."""
        num, first = len(self.places), self.first
        a_WI = matrices[first] if num == 1 else torch.cat(list(matrices[first : first + num]))
        return a_WI.to(dtype), [b.to(dtype) for b in matrices[first + num : first + 2 * num]]


def adapted_linear(
    x_TI: Tensor, frozen: Frozen, segments: Sequence[Segment], paths: Sequence[str], split: Split
) -> Tensor:
    """x W^T + bias, and to each segment's rows (alpha / rank) (x A^T) B^T: [T, O]. Differentiable in x, A and B.

    Args: split: see LoraLinear.
    """
    matrices: list[Tensor] = []
    parts: list[tuple[int, int, _Adapted]] = []
    known: dict[int, _Adapted] = {}
    for segment in segments:
        lora = segment.lora
        if lora is None:
            continue
        if id(lora) not in known:
            adapted = [(place, lora.pairs[path]) for place, path in enumerate(paths) if path in lora.pairs]
            columns = tuple(slice(n * lora.rank, (n + 1) * lora.rank) for n in range(len(adapted)))
            known[id(lora)] = _Adapted(lora.scaling, tuple(place for place, _ in adapted), columns, len(matrices))
            matrices += [pair.a for _, pair in adapted] + [pair.b for _, pair in adapted]
        if known[id(lora)].places:
            parts.append((segment.start, segment.end, known[id(lora)]))
    return _AdaptedLinear.apply(x_TI, frozen, split, parts, *matrices)  # type: ignore[no-any-return]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, frozen: Frozen, split: Split, parts: list[tuple[int, int, _Adapted]], *matrices: Tensor
    ) -> Tensor:
        out_TO = frozen_product(x_TI, frozen.weight_OI, frozen.bias_O)
        downs = []
        for start, end, adapted in parts:
            a_WI, b_OR = adapted.of(matrices, x_TI.dtype)
            down_NW = torch.mm(x_TI[start:end], a_WI.t()).mul_(adapted.scaling)
            outputs = split(out_TO[start:end])
            for place, columns, b in zip(adapted.places, adapted.columns, b_OR, strict=True):
                _add_product_(outputs[place], down_NW[:, columns], b.t())
            downs.append(down_NW)
        ctx.save_for_backward(x_TI, *downs, *matrices)
        ctx.weight_OI = frozen.weight_OI  # frozen, so it needs no watching by save_for_backward
        ctx.split, ctx.parts = split, parts
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO, num = grad_outputs[0], len(ctx.parts)
        x_TI, *saved = ctx.saved_tensors
        downs, matrices = saved[:num], saved[num:]
        grad_TI = frozen_linear_grad(grad_TO, ctx.weight_OI) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * len(matrices)
        for (start, end, adapted), down_NW in zip(ctx.parts, downs, strict=True):
            a_WI, b_OR = adapted.of(matrices, x_TI.dtype)
            down_grad_NW = torch.empty_like(down_NW)
            out_grads = ctx.split(grad_TO[start:end])
            num_pairs = len(adapted.places)
            for index, (place, columns, b) in enumerate(zip(adapted.places, adapted.columns, b_OR, strict=True)):
                grad_NO = out_grads[place].flatten(1)
                down_grad_NW[:, columns] = torch.mm(grad_NO, b)
                _gather(grads, adapted.first + num_pairs + index, torch.mm(grad_NO.t(), down_NW[:, columns]))
            down_grad_NW.mul_(adapted.scaling)
            a_grad_WI = torch.mm(down_grad_NW.t(), x_TI[start:end])
            for index, columns in enumerate(adapted.columns):
                _gather(grads, adapted.first + index, a_grad_WI[columns])
            if grad_TI is not None:
                grad_TI[start:end].addmm_(down_grad_NW, a_WI)
        in_dtype = (grad if grad is None else grad.to(x.dtype) for grad, x in zip(grads, matrices, strict=True))
        return grad_TI, None, None, None, *in_dtype


def _add_product_(rows: Tensor, x_NR: Tensor, b_RO: Tensor) -> None:
    """rows += x b; rows [N, O_p], or [N, groups, O_p / groups]."""
    if rows.ndim == 2:
        rows.addmm_(x_NR, b_RO)
    else:
        rows.add_(torch.mm(x_NR, b_RO).view_as(rows))


def _gather(grads: list[Tensor | None], index: int, grad: Tensor) -> None:
    """An adapter may have several segments."""
    known = grads[index]
    grads[index] = grad if known is None else known.add_(grad)
