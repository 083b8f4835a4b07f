"""Root-mean-square norm with a frozen weight: Zhang & Sennrich 2019, arXiv:1910.07467.

torch has no kernel for it on CPUs: F.rms_norm is six operations there, and their gradient eleven more. What such an
operation costs is the fresh memory it writes (4 to 5 times the arithmetic, for 2 MB), so forward and backward are
written here with as few new tensors as there can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """As transformers computes it: float32 inside, cast, then the weight.

    The weight is frozen, so it needs no gradient sum under sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Norm over the last dimension, [..., D] in the dtype of x. Differentiable in x alone.

    weight_D: [D], or any shape that is broadcast to x.
    """
    if torch.is_grad_enabled() and x_D.requires_grad:
        return _RmsNorm.apply(x_D, weight_D, eps)  # type: ignore[no-any-return]
    return _normed(x_D, weight_D, _inverse_rms(x_D, eps))


class FrozenNorm:
    """`rms_norm` where no gradient is wanted and the weight never changes.

    In float32 as x / sqrt(sum of x^2 + D eps) * (sqrt(D) weight): fewer operations, whose number is what counts for
    few rows. Other dtypes are rounded before the weight, as transformers does.
    """

    def __init__(self, weight_D: Callable[[], Tensor], eps: float) -> None:
        """`weight_D`: [D], or any shape that is broadcast to x; asked for once, at the first use."""
        self._make_weight = weight_D
        self._eps = eps

    @cached_property
    def _weight_D(self) -> Tensor:
        return self._make_weight().detach()

    @cached_property
    def _scaled_weight_D(self) -> Tensor:
        return self._weight_D * math.sqrt(self._weight_D.shape[-1])

    @cached_property
    def _floor(self) -> Tensor:
        """sqrt(D eps), what a norm is at least."""
        return _scalar(math.sqrt(self._weight_D.shape[-1] * self._eps), torch.float32, self._weight_D.device)

    def __call__(self, x_D: Tensor) -> Tensor:
        """[..., D], dtype of x."""
        if x_D.dtype != torch.float32:
            return rms_norm(x_D, self._weight_D, self._eps)
        norm_1 = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True).hypot_(self._floor)
        return (x_D / norm_1).mul_(self._scaled_weight_D)


def _inverse_rms(x_D: Tensor, eps: float) -> Tensor:
    """float32 [..., 1]."""
    norm_1 = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True, dtype=_wide(x_D.dtype))
    return torch.addcmul(_scalar(eps, norm_1.dtype, norm_1.device), norm_1, norm_1, value=1 / x_D.shape[-1]).rsqrt_()


@cache
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def _normed(x_D: Tensor, weight_D: Tensor, inverse_1: Tensor) -> Tensor:
    return (x_D * inverse_1).to(x_D.dtype).mul_(weight_D)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / rms(x) and g' = g * weight: dx = r (g' - x r^2 mean(g' x))."""

    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse_1 = _inverse_rms(x_D, eps)
        ctx.save_for_backward(x_D, inverse_1)
        ctx.weight_D = weight_D  # frozen, so it needs no watching by save_for_backward
        return _normed(x_D, weight_D, inverse_1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        x_D, inverse_1 = ctx.saved_tensors
        grad_D = (grad_outputs[0] * ctx.weight_D).to(inverse_1.dtype)
        mean_1 = (grad_D * x_D).mean(dim=-1, keepdim=True)
        grad_D.addcmul_(x_D.to(grad_D.dtype), mean_1.mul_(inverse_1).mul_(inverse_1), value=-1)
        return grad_D.mul_(inverse_1).to(x_D.dtype), None, None
