"""Rows in another order, and back.

Shapes: N rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inverse_of(order_N: Tensor) -> Tensor:
    """The order that undoes it."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return inverse_N


def permuted(x_N: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """x[order]; the gradient is a permutation too, where indexing's own would add."""
    return _Permute.apply(x_N, order_N, inverse_N)  # type: ignore[no-any-return]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_N[order_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0][inverse_N], None, None
