"""Losses a user might write, and how the SDK sends them: shared by the tests of graph, worker and gateway."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, trace_loss
from torch import Tensor

Ranks = Mapping[str, Any]


def weighted(logprobs: Tensor, weights: Tensor):
    return -(logprobs * weights).sum(), {}


def focal(logprobs: Tensor, weights: Tensor):
    """Both kinds of metric, sizes, constants, a factory with its device."""
    count = logprobs.shape[0]
    gamma = torch.full((count,), 2.0, device=logprobs.device, dtype=logprobs.dtype)
    p = logprobs.exp()
    loss = -((1 - p) ** gamma * logprobs * weights).sum() / math.sqrt(count)
    return loss, {"custom/p:mean": p.detach().mean(), "custom/tokens:sum": (weights > 0).float().sum()}


def dpo_like(logprobs: Tensor, ref: Tensor, mask: Tensor, beta: Tensor):
    """A number for each datum, a function of torch.nn.functional."""
    margin = ((logprobs - ref) * mask).sum() * beta
    return -F.logsigmoid(margin), {"custom/margin:mean": margin, "custom/right:sum": torch.where(margin > 0, 1.0, 0.0)}


def clipped_with_entropy(logprobs: Tensor, q: Tensor, advantages: Tensor, mask: Tensor):
    ratio = torch.exp(logprobs - q)
    bounded = torch.clamp(ratio, 0.8, 1.2)
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    chosen = logprobs[mask > 0]
    spread = torch.max(logprobs.detach(), dim=0).values - logprobs.detach().min()
    return -(objective * mask).sum() - 0.01 * chosen.mean() + F.relu(logprobs + 1).sum() * 0.1, {
        "custom/spread:mean": spread
    }


def smooth(logprobs: Tensor, weights: Tensor):
    """Slices, a scan, stacking, an outer difference."""
    change = logprobs[1:] - logprobs[:-1]
    total = torch.cumsum(logprobs, dim=0)
    both = torch.stack([total, logprobs.flip(0)], dim=1)
    pairs = (logprobs.unsqueeze(0) - logprobs.unsqueeze(1)).abs().mean()
    return change.square().sum() + (both * weights[:, None]).mean() + pairs + F.softplus(-total).sum(), {}


def distilled(logprobs: Tensor, teacher: Tensor):
    """[T, K]: cross-entropy with the teacher's distribution over the K targets."""
    return -(torch.softmax(teacher, dim=-1) * logprobs).sum(), {"custom/kl:mean": (teacher - logprobs).detach().mean()}


LOSSES: Mapping[str, tuple[Callable[..., Any], Ranks]] = {
    "weighted": (weighted, {"logprobs": 1, "weights": 1}),
    "focal": (focal, {"logprobs": 1, "weights": 1}),
    "dpo_like": (dpo_like, {"logprobs": 1, "ref": 1, "mask": 1, "beta": 0}),
    "clipped_with_entropy": (clipped_with_entropy, {"logprobs": 1, "q": 1, "advantages": 1, "mask": 1}),
    "smooth": (smooth, {"logprobs": 1, "weights": 1}),
    "distilled": (distilled, {"logprobs": 2, "teacher": 2}),
}


def handle(name: str) -> LossHandle:
    function, ranks = LOSSES[name]
    return trace_loss(function, ranks, "session")


def payload(traced: LossHandle) -> dict[str, Any]:
    """The body of create_custom_loss, without the session."""
    return {
        "name": traced.name,
        "inputs": [each.model_dump() for each in traced.inputs],
        "graph": encode_graph(traced).model_dump(),
    }
