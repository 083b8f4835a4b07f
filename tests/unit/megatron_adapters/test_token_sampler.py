"""The choice of a token against closed forms in numpy, and against its own distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_adapters.philox import uniform_numbers
from megatron_adapters.token_sampler import NOT_FINITE, SamplingRows, sample_tokens, top_logprobs

VOCABULARY = 700  # more than two chunks of the two-level search, and not a multiple of their width


def rows(count: int, *, temperature=1.0, top_k=-1, top_p=1.0, uniform=0.5) -> SamplingRows:
    """Each parameter one value for all rows, or one a row."""
    return SamplingRows(*(np.broadcast_to(value, count).tolist() for value in (temperature, top_k, top_p, uniform)))


def random_logits(count: int, *, width: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3


def log_softmax(logits: Tensor) -> np.ndarray:
    z = logits.double().numpy()
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def draw(logits_V: Tensor, count: int, **parameters) -> np.ndarray:
    """Many independent draws from one distribution."""
    uniform = uniform_numbers([5] * count, [0] * count, range(count))
    tokens, _ = sample_tokens(logits_V.expand(count, -1), rows(count, uniform=uniform, **parameters))
    return tokens.numpy()


def test_token_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = random_logits(64)
    uniform = np.linspace(0, 0.9999, 64)
    tokens, _ = sample_tokens(logits, rows(64, uniform=uniform))
    cumulative = np.exp(log_softmax(logits)).cumsum(-1)
    expected = [np.searchsorted(cumulative[i], float(uniform[i]), side="right") for i in range(64)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (4, 1.0), (-1, 0.6), (30, 0.8)])
def test_logprob_is_that_of_the_whole_temperature_scaled_distribution(temperature, top_k, top_p) -> None:
    logits = random_logits(32)
    uniform = np.linspace(0, 0.999, 32)
    tokens, logprobs = sample_tokens(
        logits, rows(32, temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform)
    )
    expected = log_softmax(logits.double() / temperature)[np.arange(32), tokens]
    np.testing.assert_allclose(logprobs.numpy(), expected, atol=2e-6 / temperature, rtol=0)


def test_greedy_takes_the_lowest_of_equal_logits_at_temperature_one() -> None:
    logits = random_logits(3)
    logits[0, [41, 17, 600]] = 50.0
    tokens, logprobs = sample_tokens(logits, rows(3, temperature=0.0, top_k=2, top_p=0.1, uniform=0.99))
    assert tokens.tolist() == [17, int(logits[1].argmax()), int(logits[2].argmax())]
    np.testing.assert_allclose(logprobs.numpy(), log_softmax(logits)[np.arange(3), tokens], atol=2e-6, rtol=0)


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0]))
    counts = np.bincount(draw(logits, 40_000), minlength=5)
    expected = 40_000 * np.array([0.5, 0.25, 0.125, 0.125])
    assert counts[4] == 0
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # 99.9 % point, 3 degrees of freedom, fixed seed


def test_top_k_then_top_p_keep_what_they_should() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2]))
    assert set(draw(logits, 2000, top_k=2)) == {1, 2}
    assert set(draw(logits, 2000, top_k=1)) == {1}
    assert set(draw(logits, 2000, top_p=0.41)) == {1, 2}  # 0.4 does not reach 0.41
    assert set(draw(logits, 2000, top_p=0.05)) == {1}  # at least one
    # top-p is of what top-k leaves: 0.4 / 0.7 = 0.571 reaches 0.57, of the whole it would need two
    assert set(draw(logits, 2000, top_k=2, top_p=0.57)) == {1}
    # renormalised: 0.4 and 0.3 in the ratio 4 : 3
    share = np.bincount(draw(logits, 20_000, top_k=2), minlength=4)[1] / 20_000
    assert abs(share - 4 / 7) < 0.012


def test_top_p_beyond_the_first_candidates() -> None:
    """A flat distribution over more tokens than top-p looks at first: the whole vocabulary must be used."""
    logits = torch.zeros(1, 2000)
    ends = [sample_tokens(logits, rows(1, top_p=0.9, uniform=uniform))[0].item() for uniform in (0.0, 1 - 2**-53)]
    assert ends == [0, 1799]  # equal logits rank by token id


def test_top_k_ties_go_to_the_lower_id() -> None:
    assert set(draw(torch.zeros(2500), 3000, top_k=3)) == {0, 1, 2}


def test_a_row_does_not_see_its_neighbours() -> None:
    count = 12
    logits = random_logits(count)
    parameters = {
        "temperature": [0.0, 0.5, 1.0, 2.0] * 3,
        "top_k": [-1] * 4 + [5] * 4 + [-1] * 4,
        "top_p": [1.0] * 8 + [0.7] * 4,
        "uniform": np.linspace(0.05, 0.95, count),
    }
    tokens, logprobs = sample_tokens(logits, rows(count, **parameters))
    for i in range(count):
        one = {name: value[i] for name, value in parameters.items()}
        token, logprob = sample_tokens(logits[i : i + 1], rows(1, **one))
        assert token.item() == tokens[i] and logprob.item() == logprobs[i]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.5)])
def test_a_diverged_row_is_marked_and_spares_the_others(bad: float, temperature: float, top_p: float) -> None:
    logits = random_logits(3)
    clean, _ = sample_tokens(logits, rows(3, temperature=temperature, top_p=top_p))
    logits[1, 5] = bad
    tokens, _ = sample_tokens(logits, rows(3, temperature=temperature, top_p=top_p))
    assert tokens[1] == NOT_FINITE
    assert tokens[0] == clean[0] and tokens[2] == clean[2]


def test_masked_tokens_are_never_drawn() -> None:
    """-inf logits are legal; the largest uniform number must not fall on the zero mass at the end."""
    logits = random_logits(1)
    logits[:, 300:] = float("-inf")
    tokens, logprobs = sample_tokens(logits, rows(1, uniform=1 - 2**-53))
    assert tokens.item() < 300 and torch.isfinite(logprobs).all()


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = random_logits(4).bfloat16()
    _, logprobs = sample_tokens(logits, rows(4))
    tokens, expected = sample_tokens(logits.float(), rows(4))
    assert logprobs.dtype == torch.float32 and torch.equal(logprobs, expected) and tokens.dtype == torch.int64


def test_candidates_are_ranked_where_their_probability_is_nothing_in_float32() -> None:
    """At temperature 0.1 the runners-up are 120 and 130 below the peak; exp of that is 0 below about -103."""
    logits = torch.full((1, VOCABULARY), -5.0)
    logits[0, 600], logits[0, 400], logits[0, 500], logits[0, 300] = 22.0, 10.0, 9.0, 9.0
    expected = [600, 400, 300, 500, 0, 1]  # the lower id first among equals
    for heat, scaled in ((0.1, logits), (1.0, logits * 10)):
        top = top_logprobs(scaled, [heat], 6)
        assert top.token_ids.tolist() == [expected]
        np.testing.assert_allclose(top.logprobs, log_softmax(logits * 10)[:, expected], atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_candidates_are_those_of_a_whole_sort(k: int) -> None:
    logits = random_logits(4).round()  # many equals
    logits[1, 100:] = float("-inf")
    top = top_logprobs(logits, [0.0, 1.0, 0.7, 3e-3], k)
    for row in range(4):
        assert top.token_ids[row].tolist() == np.argsort(-logits[row].numpy(), kind="stable")[:k].tolist()
    assert (np.diff(top.logprobs[:, : min(k, 100)]) <= 0).all()
