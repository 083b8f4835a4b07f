"""Losses against closed forms: values and gradients, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_hpc.errors import RequestError
from tinker_hpc.loss_table import KNOWN_LOSSES, offered_losses
from tinker_hpc.worker.losses import LOSSES, bind


def case(seed: int, num_tokens: int = 17) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(2.0, num_tokens)
    segments = np.sort(rng.integers(0, 4, num_tokens))
    return logprobs, rng.normal(size=num_tokens), segments


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_cross_entropy(seed: int) -> None:
    logprobs, weights, segments = case(seed)
    p = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    inputs = {"weights": torch.tensor(weights, dtype=torch.float64)}
    value = bind("cross_entropy", {})(p, inputs, torch.tensor(segments))
    (gradient,) = torch.autograd.grad(value, p)
    np.testing.assert_allclose(value.item(), -np.dot(logprobs, weights), rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(gradient.numpy(), -weights)


def test_the_gradient_agrees_with_differences() -> None:
    logprobs, weights, segments = case(3)
    inputs = {"weights": torch.tensor(weights)}
    p = torch.tensor(logprobs, requires_grad=True)
    for name in LOSSES:
        loss = bind(name, {})
        assert torch.autograd.gradcheck(lambda p, loss=loss: loss(p, inputs, torch.tensor(segments)), (p,))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_a_sum_over_sequences(name: str) -> None:
    """The engine cuts a batch into micro-batches as the layout wants: the parts must add up to the whole."""
    logprobs, weights, segments = case(5)
    p, s = torch.tensor(logprobs), torch.tensor(segments)
    loss = bind(name, {})
    whole = loss(p, {"weights": torch.tensor(weights)}, s)
    parts = [loss(p[s == i], {"weights": torch.tensor(weights)[s == i]}, s[s == i]) for i in s.unique()]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-13, atol=1e-13)


def test_the_registry_is_the_table_of_offered_losses() -> None:
    assert set(LOSSES) == set(offered_losses())
    assert all(loss.source for loss in LOSSES.values())


def test_unknown_names_and_keys_are_refused() -> None:
    with pytest.raises(RequestError, match=r"'ppo2' is not computed by this worker\. Use one of: cross_entropy"):
        bind("ppo2", {})
    with pytest.raises(RequestError, match="loss_fn_config has beta; loss_fn 'cross_entropy' allows: none"):
        bind("cross_entropy", {"beta": 1.0})
    assert not KNOWN_LOSSES["cross_entropy"].config
