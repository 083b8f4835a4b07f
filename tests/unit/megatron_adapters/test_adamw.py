"""Our flat AdamW against torch's, and clipping against torch's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_adapters import optimizer
from megatron_adapters.interface import AdamParams
from megatron_adapters.optimizer import adamw_, clip_


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_equal_torch(weight_decay: float) -> None:
    adam = AdamParams(learning_rate=3e-3, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW(
        [theirs],
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        foreach=False,
    )
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros(200), torch.zeros(200)
    for step in range(1, 11):
        grad = torch.randn(200, generator=generator)
        grad[:5] = 0.0  # entries that never get a gradient: 0 / (0 + eps)
        theirs.grad = grad.clone()
        reference.step()
        adamw_(ours, grad, exp_avg, exp_avg_sq, step=step, adam=adam)
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-6)


def test_a_step_in_pieces_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped, counted once, and the gradients dropped."""
    generator = torch.Generator().manual_seed(1)
    grads = 3.0 * torch.randn(100, generator=generator)
    adam = AdamParams(learning_rate=1e-2, grad_clip_norm=0.5)
    expected = torch.zeros(100), torch.zeros(100), torch.zeros(100)
    adamw_(expected[0], grads * (0.5 / (grads.norm() + 1e-6)), *expected[1:], step=1, adam=adam)
    monkeypatch.setattr(optimizer, "_PIECE", 7)
    adapter: Any = SimpleNamespace(
        weights=torch.zeros(100), grads=grads.clone(), exp_avg=torch.zeros(100), exp_avg_sq=torch.zeros(100),
        step=0, has_gradients=True,
    )  # fmt: skip
    optimizer.step_(adapter, adam, float(grads.norm()))
    for ours, theirs in zip((adapter.weights, adapter.exp_avg, adapter.exp_avg_sq), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert adapter.step == 1 and not adapter.has_gradients and not adapter.grads.any()


def test_first_step_is_the_learning_rate_times_the_sign() -> None:
    weights, grads = torch.zeros(3), torch.tensor([2.0, -1e-3, 0.0])
    adamw_(weights, grads, torch.zeros(3), torch.zeros(3), step=1, adam=AdamParams(learning_rate=0.5))
    torch.testing.assert_close(weights, torch.tensor([-0.5, 0.5, 0.0]))


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_clipping_bounds_the_norm(max_norm: float, expected: float) -> None:
    grads = torch.tensor([3.0, 4.0])
    clip_(grads, 5.0, max_norm)
    assert grads.norm().item() == pytest.approx(expected, rel=1e-5)


def test_defaults_are_tinkers() -> None:
    assert AdamParams() == AdamParams(1e-4, 0.9, 0.95, 1e-12, 0.0, 0.0)
