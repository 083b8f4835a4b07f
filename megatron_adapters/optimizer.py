"""AdamW on flat float32 vectors, and clipping by the global norm. No communication here."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapters import Adapter
from .interface import AdamParams


@torch.no_grad()
def adamw_(weights: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, adam: AdamParams) -> None:
    """One step in place; `step` counts from 1. Loshchilov & Hutter 2019, arXiv:1711.05101; torch.optim.AdamW's order
    of operations: decay first, bias corrections on step size and denominator.
    """
    weights.mul_(1.0 - adam.learning_rate * adam.weight_decay)
    exp_avg.lerp_(grads, 1.0 - adam.beta1)
    exp_avg_sq.mul_(adam.beta2).addcmul_(grads, grads, value=1.0 - adam.beta2)
    correction1 = 1.0 - adam.beta1**step
    correction2 = 1.0 - adam.beta2**step
    denominator = exp_avg_sq.sqrt().div_(correction2**0.5).add_(adam.eps)
    weights.addcdiv_(exp_avg, denominator, value=-adam.learning_rate / correction1)


def clip_(grads: Tensor, norm: float, max_norm: float) -> None:
    """Scale grads so that their global norm is at most max_norm; 0 means off. torch.nn.utils.clip_grad_norm_'s rule."""
    if max_norm > 0.0:
        grads.mul_(min(1.0, max_norm / (norm + 1e-6)))


def step_(adapter: Adapter, adam: AdamParams, norm: float) -> None:
    """Clip, step, count, and drop the gradients. A step without gradients is one with gradient zero."""
    clip_(adapter.grads, norm, adam.grad_clip_norm)
    adapter.step += 1
    adamw_(adapter.weights, adapter.grads, adapter.exp_avg, adapter.exp_avg_sq, step=adapter.step, adam=adam)
    adapter.zero_grad()
