"""Products of which a row has the same bits whatever other rows are beside it.

What a token's activations are must not depend on who else is in the batch: its gradients are sums that cancel, so that
a last bit in the forward is ten times as much in them (an adapter alone and beside seven others: 3.8e-6 of the largest
entry where the forwards differ in a bit, 4e-7 where they do not). The libraries' kernels sum a row in the same order
however many there are, but for few rows, and for a single column: MKL 2024 on AVX-512 up to 15 rows, oneDNN 3 one row.
So few rows are made more of, and one column two; larger products are as they were. MKL's AVX2 kernels treat the rows at
the edge of a tile differently still. torch's own loops leave a row alone where it is whole vectors.

On CPUs; elsewhere these are the plain products.

Shapes: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST_ROWS = 16
_WHOLE_VECTORS = 32
"""Elements that a loop over float32 takes at a time with AVX-512; for what is left over it has other functions."""
_NARROW = 16
"""Columns, below which MKL's products of a row-major matrix take longer than of its transpose."""


def more_rows(x_NI: Tensor) -> Tensor:
    """Zeros after the end, up to FEWEST_ROWS."""
    return F.pad(x_NI, (0, 0, 0, FEWEST_ROWS - len(x_NI))) if _are_few(x_NI) else x_NI


def whole_vectors(x_NI: Tensor) -> Tensor:
    """Zeros after each row, so that an exponential of an entry does not depend on the row's place among others."""
    missing = -x_NI.shape[1] % _WHOLE_VECTORS if x_NI.is_cpu else 0
    return F.pad(x_NI, (0, missing)) if missing else x_NI


def linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, [N, O]. Differentiable in both."""
    num_rows, num_outputs = len(x_NI), len(weight_OI)
    # Of one input the gradient by x would be one column.
    x_NI, weight_OI = _two_columns(x_NI), _two_columns(weight_OI)
    return F.linear(more_rows(x_NI), _two_rows(weight_OI))[:num_rows, :num_outputs]


def linear_without_graph(x_NI: Tensor, weight_RI: Tensor) -> Tensor:
    """The same of a narrow matrix, for functions that write their own backward: [N, R].

    The BLAS, also where wide products are oneDNN's (frozen_linear.py): 128 x 512 by 8 to 64 rows took it 24 to 88 us,
    oneDNN 39 to 140 us (an AMD EPYC, two threads).
    """
    num_rows, rank = x_NI.shape[0], weight_RI.shape[0]
    if not x_NI.is_cpu or (num_rows >= FEWEST_ROWS and rank > 1):
        return F.linear(x_NI, weight_RI)
    return F.linear(more_rows(x_NI), _two_rows(weight_RI))[:num_rows, :rank]


def linear_grad(grad_NO: Tensor, weight_RO: Tensor) -> Tensor:
    """grad W^T, [N, R]: the gradient by x of x W."""
    # As a view of [O, R], of few columns, it is what MKL is slowest at; the copy costs less.
    narrow = grad_NO.is_cpu and _is_narrow(weight_RO.shape[0])
    return linear_without_graph(grad_NO, weight_RO.contiguous() if narrow else weight_RO)


def add_product_(rows_NO: Tensor, x_NR: Tensor, weight_RO: Tensor, scaling: float) -> None:
    """rows += scaling * x w, in place."""
    if _are_few(x_NR):
        rows_NO.copy_(more_rows(rows_NO).addmm_(more_rows(x_NR), weight_RO, alpha=scaling)[: x_NR.shape[0]])
    else:
        rows_NO.addmm_(x_NR, weight_RO, alpha=scaling)


def add_outer_(sum_OR: Tensor, grad_NO: Tensor, x_NR: Tensor, scaling: float) -> None:
    """sum += scaling * grad^T x, in place; the product in the dtype of its factors."""
    if x_NR.is_cpu and _is_narrow(x_NR.shape[1]):  # 1536 x 128 by 8 columns: 74 us so, 234 us otherwise (as above)
        sum_OR.add_(torch.mm(x_NR.t(), grad_NO).t(), alpha=scaling)
    elif sum_OR.dtype == grad_NO.dtype:
        sum_OR.addmm_(grad_NO.t(), x_NR, alpha=scaling)
    else:
        sum_OR.add_(torch.mm(grad_NO.t(), x_NR), alpha=scaling)


def _are_few(x_NI: Tensor) -> bool:
    return x_NI.is_cpu and x_NI.shape[0] < FEWEST_ROWS


def _is_narrow(rank: int) -> bool:
    return 1 < rank < _NARROW


def _two_rows(x_NI: Tensor) -> Tensor:
    return F.pad(x_NI, (0, 0, 0, 1)) if x_NI.is_cpu and x_NI.shape[0] == 1 else x_NI


def _two_columns(x_NI: Tensor) -> Tensor:
    return F.pad(x_NI, (0, 1)) if x_NI.is_cpu and x_NI.shape[1] == 1 else x_NI
