"""Sampling: the trainer's own distribution, scaled, seeded and stopped as asked."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import serving
import tinker

pytestmark = pytest.mark.slow

WAIT_S = 60
done = serving.done
PROMPT = tinker.ModelInput.from_ints([5, 17, 300, 42])


@pytest.fixture(scope="module")
def trained(server, service_client) -> tinker.TrainingClient:
    """A model that a few large steps have moved away from its base."""
    client = done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=3))
    tokens = np.random.default_rng(0).integers(3, 1000, 33).tolist()
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 32}
    data = [tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)]
    for _ in range(3):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=5e-3)).result(WAIT_S)
    return client


@pytest.fixture(scope="module")
def sampler(trained) -> tinker.SamplingClient:
    return done(trained.save_weights_and_get_sampling_client())


@pytest.fixture(scope="module")
def base_sampler(server, service_client) -> tinker.SamplingClient:
    return done(service_client.create_sampling_client(base_model=server.base_model))


def sample(client: tinker.SamplingClient, *, num_samples: int = 1, prompt=PROMPT, **params):
    parameters = tinker.SamplingParams(**{"max_tokens": 8, **params})
    return client.sample(prompt, num_samples, parameters).result(WAIT_S)


def tokens_of(response) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


def test_shapes_and_identities(sampler):
    response = sample(sampler, num_samples=3, stop=[])
    assert [len(sequence.tokens) for sequence in response.sequences] == [8, 8, 8]
    assert [len(sequence.logprobs) for sequence in response.sequences] == [8, 8, 8]
    assert {sequence.stop_reason for sequence in response.sequences} == {"length"}
    if hasattr(response.sequences[0], "sequence_id"):  # since 0.26
        assert len({sequence.sequence_id for sequence in response.sequences}) == 3


def test_seeds(sampler):
    one = tokens_of(sample(sampler, seed=1, stop=[], max_tokens=16))
    assert one == tokens_of(sample(sampler, seed=1, stop=[], max_tokens=16))
    assert one != tokens_of(sample(sampler, seed=2, stop=[], max_tokens=16))
    drawn = [tokens_of(sample(sampler, stop=[], max_tokens=16)) for _ in range(2)]
    assert drawn[0] != drawn[1], "without a seed each request draws its own"


def test_greedy_tokens_and_logprobs_are_the_trainers(sampler, trained):
    response = sample(sampler, temperature=0, stop=[], max_tokens=6)
    (sequence,) = response.sequences
    whole = [*PROMPT.to_ints(), *sequence.tokens]
    inputs = {"target_tokens": whole[1:], "weights": [0.0] * (len(whole) - 1)}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=inputs)
    output = trained.forward([datum], "cross_entropy").result(WAIT_S).loss_fn_outputs[0]
    trainers = output["logprobs"].to_numpy()
    np.testing.assert_allclose(sequence.logprobs, trainers[len(PROMPT.to_ints()) - 1 :], atol=1e-4)
    scored = sampler.compute_logprobs(tinker.ModelInput.from_ints(whole)).result(WAIT_S)
    assert scored[0] is None
    np.testing.assert_allclose(scored[1:], trainers, atol=1e-4)


@pytest.mark.since("0.36")
def test_prompt_logprobs_of_the_last_tokens_only(sampler):
    every = sampler.compute_logprobs(PROMPT).result(WAIT_S)
    last = sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result(WAIT_S)
    assert last == [None, None, *every[2:]]


def test_stop_tokens_are_part_of_the_answer(sampler):
    unstopped = tokens_of(sample(sampler, temperature=0, stop=[]))[0]
    stop = unstopped[2]
    (sequence,) = sample(sampler, temperature=0, stop=[stop]).sequences
    assert sequence.stop_reason == "stop"
    assert sequence.tokens == unstopped[: unstopped.index(stop) + 1]


def test_stop_texts_and_what_stops_without_any(sampler):
    tokenizer = sampler.get_tokenizer()
    (whole,) = tokens_of(sample(sampler, temperature=0, stop=[]))
    texts = [tokenizer.decode(whole[: n + 1]) for n in range(len(whole))]
    stop = texts[3][len(texts[2]) :] or texts[3]
    for given in (stop, [stop]):
        (sequence,) = sample(sampler, temperature=0, stop=given).sequences
        assert sequence.stop_reason == "stop" and stop in tokenizer.decode(sequence.tokens)
        assert sequence.tokens == whole[: len(sequence.tokens)]
    (unstopped,) = sample(sampler, temperature=0, stop=[]).sequences
    assert (unstopped.stop_reason, len(unstopped.tokens)) == ("length", 8), "an empty list turns EOS off too"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logprobs_are_those_of_the_scaled_distribution(base_sampler, temperature):
    """log p_T(a) - log p_T(b) = (log p_1(a) - log p_1(b)) / T: the normalizer drops out."""
    response = sample(base_sampler, num_samples=24, temperature=temperature, max_tokens=1, stop=[], seed=1)
    scaled = {sequence.tokens[0]: sequence.logprobs[0] for sequence in response.sequences}
    assert len(scaled) > 2
    plain = {}
    for token in scaled:
        whole = tinker.ModelInput.from_ints([*PROMPT.to_ints(), token])
        plain[token] = base_sampler.compute_logprobs(whole).result(WAIT_S)[-1]
    first, *others = scaled
    for token in others:
        expected = (plain[token] - plain[first]) / temperature
        assert abs(scaled[token] - scaled[first] - expected) < 1e-3


def test_the_first_prompt_logprob_is_none(base_sampler):
    response = base_sampler.sample(
        PROMPT, 1, tinker.SamplingParams(max_tokens=1, temperature=0), include_prompt_logprobs=True
    ).result(WAIT_S)
    assert response.prompt_logprobs[0] is None and all(value < 0 for value in response.prompt_logprobs[1:])
    assert response.prompt_logprobs == base_sampler.compute_logprobs(PROMPT).result(WAIT_S)
    without = sample(base_sampler, max_tokens=1)
    assert without.prompt_logprobs is None
    one_token = tinker.ModelInput.from_ints(PROMPT.to_ints()[:1])
    assert base_sampler.compute_logprobs(one_token).result(WAIT_S) == [None], "nothing comes before it"


def test_a_snapshot_does_not_follow_the_training(server, trained, sampler):
    before = sampler.compute_logprobs(PROMPT).result(WAIT_S)
    inputs = {"target_tokens": [7, 8, 9], "weights": [1.0] * 3}
    data = [tinker.Datum(model_input=tinker.ModelInput.from_ints([6, 7, 8]), loss_fn_inputs=inputs)]
    trained.forward_backward(data, "cross_entropy")
    trained.optim_step(tinker.AdamParams(learning_rate=5e-3)).result(WAIT_S)
    assert sampler.compute_logprobs(PROMPT).result(WAIT_S) == before
    newer = done(trained.save_weights_and_get_sampling_client())
    assert newer.compute_logprobs(PROMPT).result(WAIT_S) != before


def test_saved_sampler_weights_and_states_open_as_samplers(service_client, trained):
    live = done(trained.save_weights_and_get_sampling_client()).compute_logprobs(PROMPT).result(WAIT_S)
    saved = trained.save_weights_for_sampler("opened").result(WAIT_S).path
    state = trained.save_state("opened").result(WAIT_S).path
    for path in (saved, state):
        client = done(service_client.create_sampling_client(model_path=path))
        np.testing.assert_allclose(client.compute_logprobs(PROMPT).result(WAIT_S)[1:], live[1:], atol=1e-5)
        assert client.get_base_model() == trained.get_info().model_data.model_name


def test_the_base_model_and_its_tokenizer(base_sampler, sampler):
    base = base_sampler.compute_logprobs(PROMPT).result(WAIT_S)
    assert base != sampler.compute_logprobs(PROMPT).result(WAIT_S)
    tokenizer = base_sampler.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_samplers_travel_to_other_processes(server, base_sampler):
    expected = tokens_of(sample(base_sampler, seed=4, stop=[]))
    assert tokens_of(sample(pickle.loads(pickle.dumps(base_sampler)), seed=4, stop=[])) == expected


@pytest.mark.since("0.36")
def test_a_handle_opens_the_same_sampler(server, base_sampler):
    handle = base_sampler.get_sampler_handle()
    assert server.api_key not in handle
    again = tinker.SamplingClient.from_sampler_handle(handle, api_key=server.api_key)
    assert tokens_of(sample(again, seed=4, stop=[])) == tokens_of(sample(base_sampler, seed=4, stop=[]))


def test_many_at_once(base_sampler):
    prompts = [tinker.ModelInput.from_ints([3 + i, 100 + i]) for i in range(64)]
    params = tinker.SamplingParams(max_tokens=4, temperature=0, stop=[])
    together = [base_sampler.sample(prompt, 1, params) for prompt in prompts]
    answers = [tokens_of(future.result(WAIT_S)) for future in together]
    alone = tokens_of(sample(base_sampler, prompt=prompts[5], max_tokens=4, temperature=0, stop=[]))
    assert answers[5] == alone


@pytest.mark.ours
def test_the_gap_between_sampler_and_trainer_is_a_metric_of_every_pass(trained):
    sampler = done(trained.save_weights_and_get_sampling_client())
    (sequence,) = sample(sampler, stop=[], max_tokens=8, seed=2).sequences
    prompt = PROMPT.to_ints()
    whole = [*prompt, *sequence.tokens]
    zeros = [0.0] * (len(prompt) - 1)
    for added, low, high in ((0.0, 0.0, 1e-4), (0.25, 0.249, 0.251)):
        inputs = {
            "target_tokens": whole[1:],
            "logprobs": [*zeros, *(logprob + added for logprob in sequence.logprobs)],
            "advantages": [*zeros, *[1.0] * 8],
        }
        datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=inputs)
        metrics = trained.forward([datum], "importance_sampling").result(WAIT_S).metrics
        assert low <= metrics["sampler_gap:mean"] <= metrics["sampler_gap:max"] <= high
