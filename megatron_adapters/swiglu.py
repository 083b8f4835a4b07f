"""silu(gate) * up, Shazeer 2020, arXiv:2002.05202, of the two side by side as one matrix product gives them.

Autograd on the two halves makes each its own gradient and copies both together; here each is written where it belongs,
and silu is computed again instead of kept.

Shapes: F width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGlu(nn.Module):
    """megatron-core's `activation_func`, which sees both halves."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x_2F: Tensor) -> Tensor:
        return swiglu(x_2F)


def swiglu(x_2F: Tensor) -> Tensor:
    """[..., 2 F], gate then up -> [..., F]."""
    if torch.is_grad_enabled() and x_2F.requires_grad:
        return _SwiGlu.apply(x_2F)  # type: ignore[no-any-return]
    gate_F, up_F = x_2F.chunk(2, dim=-1)
    return F.silu(gate_F).mul_(up_F)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_2F: Tensor) -> Tensor:
        ctx.save_for_backward(x_2F)
        gate_F, up_F = x_2F.chunk(2, dim=-1)
        return F.silu(gate_F).mul_(up_F)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x_2F,) = ctx.saved_tensors
        gate_F, up_F = x_2F.chunk(2, dim=-1)
        grad_2F = torch.empty_like(x_2F)
        gate_grad_F, up_grad_F = grad_2F.chunk(2, dim=-1)
        torch.mul(grad_outputs[0], F.silu(gate_F), out=up_grad_F)
        torch.ops.aten.silu_backward.grad_input(grad_outputs[0] * up_F, gate_F, grad_input=gate_grad_F)
        return grad_2F
