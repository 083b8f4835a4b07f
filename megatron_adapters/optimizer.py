"""AdamW on flat float32 vectors, and clipping by the global norm. No communication here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .adapters import Adapter
from .interface import AdamParams

_PIECE = 2**20
"""Entries stepped at a time on a CPU, so that clipping, step and zeroing find them in its cache: 10 million in 8.1 ms
instead of 10.2 ms (an AMD EPYC, two threads)."""


@torch.no_grad()
def adamw_(weights: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, adam: AdamParams) -> None:
    """One step in place; `step` counts from 1. Loshchilov & Hutter 2019, arXiv:1711.05101, as torch.optim.AdamW.

    torch's kernel that reads and writes each vector once: for the 26 million parameters of eight adapters 32 ms instead
    of the 167 ms of as many operations as the formula has (one thread of an Intel Xeon).
    """
    adamw(
        [weights],
        [grads],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(step - 1.0, device=weights.device)],  # it counts itself, before the step
        fused=True,
        lr=adam.learning_rate,
        beta1=adam.beta1,
        beta2=adam.beta2,
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )


def clip_(grads: Tensor, norm: float, max_norm: float) -> None:
    """Scale grads so that their global norm is at most max_norm; 0 means off. torch.nn.utils.clip_grad_norm_'s rule."""
    factor = max_norm / (norm + 1e-6)
    if max_norm > 0.0 and factor < 1.0:
        grads.mul_(factor)


def step_(adapter: Adapter, adam: AdamParams, norm: float) -> None:
    """Clip, step, count, and drop the gradients. A step without gradients is one with gradient zero."""
    adapter.step += 1
    vectors = (adapter.weights, adapter.grads, adapter.exp_avg, adapter.exp_avg_sq)
    size = _PIECE if adapter.weights.device.type == "cpu" else max(1, adapter.weights.numel())
    for weights, grads, exp_avg, exp_avg_sq in zip(*(vector.split(size) for vector in vectors), strict=True):
        clip_(grads, norm, adam.grad_clip_norm)
        adamw_(weights, grads, exp_avg, exp_avg_sq, step=adapter.step, adam=adam)
        grads.zero_()
    adapter.has_gradients = False
