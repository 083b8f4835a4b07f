"""Rows sorted by expert, and the linear map of each group with its own matrix.

On CUDA in half precision one grouped kernel (torch's grouped_mm); elsewhere a loop over the experts that got rows,
where gradients are wanted by products that do not depend on how many rows those are (row_products.py).

Shapes: N rows, E experts of this rank, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen_linear import frozen_linear
from .row_products import linear, more_rows

ALIGNMENT = 8
"""grouped_mm wants strides of whole 16 bytes: eight numbers of half precision."""


class Groups:
    """How many consecutive rows each expert has. The numbers stay on the device until somebody asks for them."""

    def __init__(self, counts_E: Tensor) -> None:
        self.counts_E = counts_E

    @cached_property
    def ends_E(self) -> Tensor:
        """int32: where each expert's rows end."""
        return self.counts_E.cumsum(0).to(torch.int32)

    @cached_property
    def sizes(self) -> list[int]:
        return self.counts_E.tolist()

    def expert_of_row(self, num_rows: int) -> Tensor:
        """int64 [N]"""
        experts = torch.arange(len(self.counts_E), device=self.counts_E.device)
        return experts.repeat_interleave(self.counts_E, output_size=num_rows)


def frozen_grouped(x_NI: Tensor, weight_EOI: Tensor, matrices: Sequence[Tensor], groups: Groups) -> Tensor:
    """x W^T of each row's expert, [N, O]; W is never trained. `matrices`: weight_EOI unbound, once and for all."""
    if by_kernel(x_NI):
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=groups.ends_E)
    parts = zip(x_NI.split(groups.sizes), matrices, strict=True)
    if torch.is_grad_enabled():
        outputs = [frozen_linear(more_rows(x), matrix)[: len(x)] for x, matrix in parts if len(x)]
    else:
        outputs = [frozen_linear(x, matrix) for x, matrix in parts if len(x)]
    return torch.cat(outputs) if outputs else F.linear(x_NI, matrices[0])


def grouped(x_NI: Tensor, weight_EOI: Tensor, groups: Groups) -> Tensor:
    """The same for a W that is trained; one that all experts share, [1, O, I], is a plain linear."""
    kernel = trains_by_kernel(x_NI) if torch.is_grad_enabled() else by_kernel(x_NI)
    product = linear if torch.is_grad_enabled() and not by_kernel(x_NI) else F.linear
    if weight_EOI.shape[0] == 1:
        return product(x_NI, weight_EOI[0])
    if kernel:
        num_outputs = weight_EOI.shape[1]
        x_NI, weight_EOI = _aligned(x_NI, 1), _aligned(_aligned(weight_EOI, 1), 2)
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=groups.ends_E)[:, :num_outputs]
    parts = zip(x_NI.split(groups.sizes), weight_EOI.unbind(), strict=True)
    outputs = [product(x, matrix) for x, matrix in parts if len(x)]
    return torch.cat(outputs) if outputs else F.linear(x_NI, weight_EOI[0])


def by_kernel(x: Tensor) -> bool:
    """Whether grouped_mm is one kernel here."""
    return x.is_cuda and x.dtype == torch.bfloat16


def trains_by_kernel(x: Tensor) -> bool:
    """Whether it gives the matrices their gradients too. Not from Blackwell on, where that of a group without rows (an
    expert without tokens) is whatever was in memory: github.com/pytorch/pytorch/issues/172439.
    """
    return by_kernel(x) and torch.cuda.get_device_capability(x.device)[0] < 10


def _aligned(x: Tensor, dim: int) -> Tensor:
    """Zeros after the end of `dim`, up to a multiple of what grouped_mm takes: a LoRA rank may be any number."""
    missing = -x.shape[dim] % ALIGNMENT
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x
