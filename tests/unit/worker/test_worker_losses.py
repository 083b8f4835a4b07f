"""Losses against closed forms in numpy: values and gradients, in float64, to 1e-10."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_forms import CLOSED, Array, Inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_hpc.errors import RequestError
from tinker_hpc.loss_table import KNOWN_LOSSES
from tinker_hpc.worker.losses import LOSSES, bind


def case(
    name: str, seed: int, num_tokens: int = 23, *, clip_inputs: bool = False
) -> tuple[Array, dict[str, Array], Array]:
    """Logprobs, inputs, segment ids (0, 1, ... as the engine numbers them); ratios inside and outside of the bounds."""
    rng = np.random.default_rng(seed)
    p = -rng.exponential(2.0, num_tokens)
    inputs = {
        "weights": rng.normal(size=num_tokens),
        "sampling_logprobs": p + rng.normal(scale=0.5, size=num_tokens),
        "advantages": rng.normal(size=num_tokens) * (rng.random(num_tokens) < 0.8),
        "sequence_ratio_mask": (rng.random(num_tokens) < 0.7) * 1.5,
        "clip_low_threshold": rng.uniform(0.3, 0.9, num_tokens),
        "clip_high_threshold": rng.uniform(1.1, 2.0, num_tokens),
    }
    declaration = KNOWN_LOSSES[name]
    taken = {*declaration.required, *(declaration.optional if clip_inputs else ())}
    ours = {"logprobs": "sampling_logprobs"}
    kept = {ours.get(key, key) for key in taken} - {"target_tokens"}
    segments = np.unique(np.sort(rng.integers(0, 5, num_tokens)), return_inverse=True)[1]
    return p, {key: inputs[key] for key in kept}, segments


def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(values) for key, values in inputs.items()}


@pytest.mark.parametrize("clip_inputs", [False, True], ids=["bounds of the config", "bounds of each token"])
@pytest.mark.parametrize("name", sorted(CLOSED))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_values_and_gradients(name: str, clip_inputs: bool, seed: int) -> None:
    if clip_inputs and not KNOWN_LOSSES[name].optional:
        return
    p, inputs, segments = case(name, seed, clip_inputs=clip_inputs)
    config = dict(KNOWN_LOSSES[name].config)
    value, gradient = CLOSED[name](p, inputs, segments, config)
    leaf = torch.tensor(p, requires_grad=True)
    loss = bind(name, {})(leaf, tensors(inputs), torch.tensor(segments))
    (ours,) = torch.autograd.grad(loss, leaf)
    np.testing.assert_allclose(loss.item(), value, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.numpy(), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ppo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.01}),
        ("cispo", {"clip_high_threshold": 1.1}),
        ("gspo", {"clip_low_threshold": 0.99}),
        ("dro", {"beta": 3.0}),
    ],
)
def test_config_keys_are_used(name: str, config: dict[str, float]) -> None:
    p, inputs, segments = case(name, 11)
    value, _ = CLOSED[name](p, inputs, segments, {**KNOWN_LOSSES[name].config, **config})
    given_, default = (bind(name, c)(torch.tensor(p), tensors(inputs), torch.tensor(segments)) for c in (config, {}))
    np.testing.assert_allclose(given_.item(), value, rtol=1e-12)
    assert abs(given_.item() - default.item()) > 1e-6


def test_several_targets_a_token() -> None:
    rng = np.random.default_rng(2)
    p, weights = -rng.exponential(2.0, (7, 3)), rng.normal(size=(7, 3))
    leaf = torch.tensor(p, requires_grad=True)
    loss = bind("cross_entropy", {})(leaf, {"weights": torch.tensor(weights)}, torch.zeros(7, dtype=torch.int64))
    loss.backward()
    np.testing.assert_allclose(loss.item(), -(p * weights).sum(), rtol=1e-12)
    assert leaf.grad is not None
    np.testing.assert_array_equal(leaf.grad.numpy(), -weights)


def test_policies_that_agree_have_the_policy_gradient() -> None:
    """At p = q every ratio is 1, inside all bounds: the gradient is that of -A * log p (cispo's too)."""
    for name in set(LOSSES) - {"cross_entropy"}:
        p, inputs, segments = case(name, 4)
        leaf = torch.tensor(p, requires_grad=True)
        same = {**tensors(inputs), "sampling_logprobs": torch.tensor(p)}
        (gradient,) = torch.autograd.grad(bind(name, {})(leaf, same, torch.tensor(segments)), leaf)
        np.testing.assert_allclose(gradient.numpy(), -inputs["advantages"], atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_a_sum_over_sequences(name: str) -> None:
    """The engine cuts a batch into micro-batches as the layout wants: the parts must add up to the whole."""
    p, inputs, segments = case(name, 5)
    loss, x = bind(name, {}), tensors(inputs)
    whole = loss(torch.tensor(p), x, torch.tensor(segments))
    parts = []
    for segment in np.unique(segments):
        here = torch.tensor(segments == segment)
        alone = {key: values[here] for key, values in x.items()}
        parts.append(loss(torch.tensor(p)[here], alone, torch.zeros(int(here.sum()), dtype=torch.int64)))
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-13, atol=1e-13)


def test_the_registry_is_the_table() -> None:
    assert set(LOSSES) == set(KNOWN_LOSSES) == set(CLOSED)
    assert all(loss.source for loss in LOSSES.values())


def test_unknown_names_and_keys_are_refused() -> None:
    with pytest.raises(RequestError, match=r"'ppo2' is not computed by this worker\. Use one of: cross_entropy"):
        bind("ppo2", {})
    with pytest.raises(RequestError, match="loss_fn_config has beta; loss_fn 'cross_entropy' allows: none"):
        bind("cross_entropy", {"beta": 1.0})
