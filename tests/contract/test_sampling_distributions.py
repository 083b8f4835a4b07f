"""Every number a sample response can carry, asked for with the stock SDK, judged by transformers on the base model."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch

pytestmark = pytest.mark.slow

WAIT_S = 60
TOLERANCE = 1e-4  # natural log, float32 on both sides
TOKENS = [5, 17, 300, 42, 8, 61, 400, 12, 99]
PROMPT = tinker.ModelInput.from_ints(TOKENS)


@pytest.fixture(scope="module")
def sampler(service, service_client) -> tinker.SamplingClient:
    return service_client.create_sampling_client(base_model=service.base_model).result(WAIT_S)


@pytest.fixture(scope="module")
def logits(service):
    """logits(tokens)[i]: transformers' logits of the token after tokens[: i + 1], float64 [N, V]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(service.base_model, dtype=torch.float32).eval()

    def run(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].double()

    return run


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    return torch.log_softmax(logits / temperature, -1).numpy()


def ask(
    sampler: tinker.SamplingClient, num_samples: int = 1, params: dict | None = None, **more
) -> tinker.SampleResponse:
    parameters = tinker.SamplingParams(**{"max_tokens": 1, "seed": 3, "stop": [], **(params or {})})
    return sampler.sample(PROMPT, num_samples, parameters, **more).result(WAIT_S)


def test_prompt_logprobs_of_all_and_of_the_last(sampler, logits):
    expected = log_softmax(logits(TOKENS))[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    every = ask(sampler, include_prompt_logprobs=True)
    assert every.prompt_logprobs[0] is None
    np.testing.assert_allclose(every.prompt_logprobs[1:], expected, atol=TOLERANCE)
    last = ask(sampler, include_prompt_logprobs=True, prompt_logprobs_last_n=3, topk_prompt_logprobs=2)
    assert last.prompt_logprobs[:-3] == [None] * 6 and last.topk_prompt_logprobs[:-3] == [None] * 6
    np.testing.assert_allclose(last.prompt_logprobs[-3:], expected[-3:], atol=TOLERANCE)
    assert all(len(row) == 2 for row in last.topk_prompt_logprobs[-3:])


def test_the_likeliest_tokens_of_each_prompt_position(sampler, logits):
    response = ask(sampler, topk_prompt_logprobs=5)
    assert response.prompt_logprobs is None, "not asked for"
    expected = torch.log_softmax(logits(TOKENS), -1).topk(5)
    assert response.topk_prompt_logprobs[0] is None
    for row, ids, values in zip(response.topk_prompt_logprobs[1:], expected.indices, expected.values, strict=False):
        assert [token for token, _ in row] == ids.tolist()
        np.testing.assert_allclose([logprob for _, logprob in row], values, atol=TOLERANCE)


def test_given_tokens_along_the_prompt_dense_and_sparse(sampler, logits):
    expected = log_softmax(logits(TOKENS))
    ids = torch.randint(0, 500, (len(TOKENS) - 1, 3), generator=torch.Generator().manual_seed(0))
    ids[2] = -1
    ids[5, 1] = -1
    dense = ask(sampler, target_prompt_logprobs=tinker.TensorData.from_torch(ids)).target_prompt_logprobs
    assert dense.shape == list(ids.shape) and dense.dtype == "float32"
    named = (ids >= 0).numpy()
    wanted = np.where(named, np.take_along_axis(expected[:-1], ids.clamp(min=0).numpy(), 1), 0.0)
    np.testing.assert_allclose(dense.to_numpy().reshape(ids.shape), wanted, atol=TOLERANCE)
    assert (dense.to_numpy().reshape(ids.shape)[~named] == 0).all()

    few = torch.full((len(TOKENS) - 1, 40), -1)
    few[3, 7], few[6, 39] = 11, 12
    asked = tinker.TensorData.from_torch_sparse(few, pad_value=-1)
    assert asked.sparse_crow_indices is not None
    sparse = ask(sampler, target_prompt_logprobs=asked).target_prompt_logprobs
    assert sparse.shape == list(few.shape) and sparse.sparse_crow_indices == asked.sparse_crow_indices
    assert sparse.sparse_col_indices == asked.sparse_col_indices
    np.testing.assert_allclose(sparse.data, [expected[3, 11], expected[6, 12]], atol=TOLERANCE)


def test_alternatives_are_drawn_from_the_models_own_distribution(sampler, logits):
    k, temperature = 400, 0.7
    first, again, other = (
        ask(sampler, params={"temperature": temperature, "seed": seed, "top_k": 1}, prompt_alt_tokens_k=k)
        for seed in (3, 3, 4)
    )
    tokens = first.prompt_alt_tokens.tokens.to_numpy().reshape(-1, k)
    assert tokens.shape == (len(TOKENS) - 1, k)
    np.testing.assert_array_equal(tokens, again.prompt_alt_tokens.tokens.to_numpy().reshape(-1, k))
    assert (tokens != other.prompt_alt_tokens.tokens.to_numpy().reshape(-1, k)).any()
    reference = logits(TOKENS)[:-1]
    logprobs = first.prompt_alt_tokens.logprobs.to_numpy().reshape(-1, k)
    np.testing.assert_allclose(logprobs, np.take_along_axis(log_softmax(reference), tokens, 1), atol=TOLERANCE)
    # The likeliest token's share of k draws: binomial, held to five standard deviations; top_k does not cut these.
    probability = np.exp(log_softmax(reference, temperature))
    share = (tokens == probability.argmax(1)[:, None]).mean(1)
    largest = probability.max(1)
    assert (np.abs(share - largest) <= 5 * np.sqrt(largest * (1 - largest) / k) + 1e-9).all()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.6])
def test_sampled_logprobs_and_candidates_are_of_the_scaled_distribution(sampler, logits, temperature):
    params = {"max_tokens": 6, "temperature": temperature, "top_k": 3, "top_p": 0.95}
    response = ask(sampler, 3, params, topk_sample_logprobs=4)
    for sequence in response.sequences:
        reference = logits([*TOKENS, *sequence.tokens])[len(TOKENS) - 1 : -1]
        expected = torch.log_softmax(reference / (temperature or 1.0), -1)
        own = expected[torch.arange(6), torch.tensor(sequence.tokens)]
        np.testing.assert_allclose(sequence.logprobs, own, atol=TOLERANCE)
        top = expected.topk(4)
        for row, ids, values, token in zip(
            sequence.topk_logprobs, top.indices, top.values, sequence.tokens, strict=True
        ):
            assert [candidate for candidate, _ in row] == ids.tolist()
            np.testing.assert_allclose([logprob for _, logprob in row], values, atol=TOLERANCE)
            assert token in ids[:3].tolist(), "top_k=3"
            assert temperature > 0 or token == ids[0]


def test_top_p_keeps_the_smallest_set_that_reaches_it(sampler, logits):
    probability = torch.softmax(logits(TOKENS)[-1], -1)
    ordered = probability.sort(descending=True)
    # In the middle between two running sums, so that rounding decides nothing.
    sums = ordered.values.cumsum(0)
    top_p = float((sums[2] + sums[3]) / 2)
    allowed = set(ordered.indices[:4].tolist())
    drawn = {sequence.tokens[0] for sequence in ask(sampler, 400, {"top_p": top_p}).sequences}
    assert drawn <= allowed
    left = (ordered.values[:4] / sums[3]).tolist()
    assert all(token in drawn for token, p in zip(ordered.indices[:4].tolist(), left, strict=True) if p > 0.05)


def test_draws_follow_the_distribution_and_the_samples_of_one_seed_differ(sampler, logits):
    count = 2000
    response = ask(sampler, count, {"temperature": 1.0})
    probability = np.exp(log_softmax(logits(TOKENS)[-1]))
    tokens = np.array([sequence.tokens[0] for sequence in response.sequences])
    seen = np.bincount(tokens, minlength=probability.size) / count
    likely = probability > 0.02
    assert likely.sum() >= 3
    assert (np.abs(seen - probability)[likely] <= 5 * np.sqrt(probability * (1 - probability) / count)[likely]).all()


def test_stop_in_every_form(sampler, service):
    tokenizer = sampler.get_tokenizer()
    free = ask(sampler, 1, {"max_tokens": 40, "temperature": 0}).sequences[0].tokens
    text = tokenizer.decode(free)
    word = text[len(text) // 3 :][:4]
    for stop in (word, ["\x00never", word]):
        (sequence,) = ask(sampler, 1, {"max_tokens": 40, "temperature": 0, "stop": stop}).sequences
        stopped = tokenizer.decode(sequence.tokens)
        assert sequence.stop_reason == "stop" and word in stopped
        assert word not in tokenizer.decode(sequence.tokens[:-1]), "it ends with the token that completed it"
        assert sequence.tokens == free[: len(sequence.tokens)]
    (sequence,) = ask(sampler, 1, {"max_tokens": 40, "temperature": 0, "stop": [free[7]]}).sequences
    assert sequence.stop_reason == "stop" and sequence.tokens == free[: free.index(free[7]) + 1]
    (sequence,) = ask(sampler, 1, {"max_tokens": 40, "temperature": 0, "stop": None}).sequences
    ends = [place for place, token in enumerate(free) if token == tokenizer.eos_token_id]
    assert sequence.tokens == (free[: ends[0] + 1] if ends else free)


def test_everything_at_once_changes_no_token(sampler):
    params = {"max_tokens": 5, "temperature": 0.8}
    plain = ask(sampler, 2, params)
    targets = tinker.TensorData.from_numpy(np.full((len(TOKENS) - 1, 1), 7, np.int64))
    full = ask(
        sampler,
        2,
        params,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=2,
    )
    assert [s.tokens for s in full.sequences] == [s.tokens for s in plain.sequences]
    assert [s.logprobs for s in full.sequences] == [s.logprobs for s in plain.sequences]
    assert full.prompt_cache_hit_tokens == 0, "nothing is billed here"
    assert plain.topk_prompt_logprobs is plain.target_prompt_logprobs is plain.prompt_alt_tokens is None
    assert plain.sequences[0].topk_logprobs is None and plain.prompt_logprobs is None
