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

from .frozen_linear import frozen_linear_grad, frozen_product

FEWEST_ROWS = 16
_WHOLE_VECTORS = 32
"""Elements that a loop over float32 takes at a time with AVX-512; for what is left over it has other functions."""


def more_rows(x_NI: Tensor) -> Tensor:
    """Zeros after the end, up to FEWEST_ROWS."""
    return F.pad(x_NI, (0, 0, 0, FEWEST_ROWS - len(x_NI))) if _are_few(x_NI) else x_NI


def whole_vectors(x_NI: Tensor) -> Tensor:
    """Zeros after each row, so that an exponential of an entry does not depend on the row's place among others."""
    missing = -x_NI.shape[1] % _WHOLE_VECTORS if x_NI.device.type == "cpu" else 0
    return F.pad(x_NI, (0, missing)) if missing else x_NI


def linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, [N, O]. Differentiable in both."""
    num_rows, num_outputs = len(x_NI), len(weight_OI)
    # Of one input the gradient by x would be one column.
    x_NI, weight_OI = _two_columns(x_NI), _two_columns(weight_OI)
    return F.linear(more_rows(x_NI), _two_rows(weight_OI))[:num_rows, :num_outputs]


def linear_without_graph(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """The same by frozen_product, for functions that write their own backward."""
    if _are_few(x_NI) or len(weight_OI) == 1:
        return frozen_product(more_rows(x_NI), _two_rows(weight_OI))[: len(x_NI), : len(weight_OI)]
    return frozen_product(x_NI, weight_OI)


def linear_grad(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """Its gradient by x: grad W, [N, I]."""
    num_inputs = weight_OI.shape[1]
    if _are_few(grad_NO) or num_inputs == 1:
        return frozen_linear_grad(more_rows(grad_NO), _two_columns(weight_OI))[: len(grad_NO), :num_inputs]
    return frozen_linear_grad(grad_NO, weight_OI)


def add_product_(rows_NO: Tensor, x_NR: Tensor, weight_RO: Tensor) -> None:
    """rows += x w, in place."""
    if _are_few(x_NR):
        rows_NO.copy_(more_rows(rows_NO).addmm_(more_rows(x_NR), weight_RO)[: len(x_NR)])
    else:
        rows_NO.addmm_(x_NR, weight_RO)


def product(x_NR: Tensor, weight_RO: Tensor) -> Tensor:
    """x w, [N, O]."""
    if _are_few(x_NR):
        return torch.mm(more_rows(x_NR), weight_RO)[: len(x_NR)]
    return torch.mm(x_NR, weight_RO)


def _are_few(x_NI: Tensor) -> bool:
    return len(x_NI) < FEWEST_ROWS and x_NI.device.type == "cpu"


def _two_rows(x_NI: Tensor) -> Tensor:
    return F.pad(x_NI, (0, 0, 0, 1)) if len(x_NI) == 1 and x_NI.device.type == "cpu" else x_NI


def _two_columns(x_NI: Tensor) -> Tensor:
    return F.pad(x_NI, (0, 1)) if x_NI.shape[1] == 1 and x_NI.device.type == "cpu" else x_NI
