"""One adapter's matrices for the projections of one fused linear, put together once and used in every step.

An adapter's A of projections that share an input lie one above the other in memory (adapters.py), so that they are one
matrix without a copy, and so are their gradients. What a step of eight adapters costs beside one is to a part the
Python between many small products: what does not change from step to step is made once.

Shapes: T tokens, I inputs, O outputs of a projection, R rank, W columns of all projections together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .adapters import LoraWeights
from .row_products import add_outer_

Split = Callable[[Tensor], list[Tensor]]
"""The part of each projection in a fused output, as views: [T, O_p] or [T, groups, O_p / groups]."""


class Stack:
    """Attributes: places: of the adapted projections among the linear's paths. a_RI, b_OR: theirs, in this order."""

    def __init__(self, lora: LoraWeights, paths: Sequence[str]) -> None:
        self.rank, self.scaling = lora.rank, lora.scaling
        pairs = {place: lora.pairs[path] for place, path in enumerate(paths) if path in lora.pairs}
        self.places = tuple(pairs)
        self.a_RI = tuple(pair.a for pair in pairs.values())
        self.b_OR = tuple(pair.b for pair in pairs.values())
        self.width = self.rank * len(pairs)
        self._a_WI = as_one(self.a_RI) if pairs else None
        self._b_RO = [b_OR.detach().t() for b_OR in self.b_OR]
        self._a_grads: tuple[list[Tensor], Tensor | None] = ([], None)

    def a_WI(self, dtype: torch.dtype) -> Tensor:
        """All A, one above the other."""
        a_WI = self._a_WI
        if a_WI is None:
            a_WI = torch.cat([a_RI.detach() for a_RI in self.a_RI])
        return a_WI if a_WI.dtype == dtype else a_WI.to(dtype)

    def b_RO(self, dtype: torch.dtype) -> list[Tensor]:
        """Each B, transposed."""
        return self._b_RO if self._b_RO[0].dtype == dtype else [b_RO.to(dtype) for b_RO in self._b_RO]

    def add_gradient_of_a(self, h_grad_NW: Tensor, x_NI: Tensor) -> None:
        """Add scaling * h_grad^T x to what the A have."""
        if not self.a_RI[0].requires_grad:
            return
        grads = [gradient_of(a_RI) for a_RI in self.a_RI]
        known, whole = self._a_grads
        if len(known) != len(grads) or any(new is not old for new, old in zip(grads, known, strict=True)):
            whole = as_one(grads)
            self._a_grads = (grads, whole)
        if whole is not None:
            add_outer_(whole, h_grad_NW, x_NI, self.scaling)
            return
        for grad_RI, h_grad_NR in zip(grads, h_grad_NW.chunk(len(grads), 1), strict=True):
            add_outer_(grad_RI, h_grad_NR, x_NI, self.scaling)


def stack_of(lora: LoraWeights, paths: tuple[str, ...]) -> Stack:
    """Made at the first use, and kept with the adapter."""
    known: Stack | None = lora.stacks.get(paths)
    if known is None:
        known = lora.stacks[paths] = Stack(lora, paths)
    return known


def add_gradient_(matrix_OR: Tensor, grad_NO: Tensor, x_NR: Tensor, scaling: float) -> None:
    """Add scaling * grad^T x to the matrix's own gradient, where it wants one."""
    if matrix_OR.requires_grad:
        add_outer_(gradient_of(matrix_OR), grad_NO, x_NR, scaling)


def gradient_of(matrix: Tensor) -> Tensor:
    """The matrix's `.grad`, zero at first."""
    if matrix.grad is None:
        matrix.grad = torch.zeros_like(matrix)
    return matrix.grad


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
