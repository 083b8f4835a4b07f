"""Sampling under every layout: transformers' tokens, the trainer's logprobs, and independence from the crowd."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job
from parity_reference import RANK, Reference, load_transformers
from sampling_scenarios import NEW_TOKENS, prompts

from launch.memory_model import Job as PlannedJob
from launch.memory_model import snapshot_memory as planned_snapshots
from launch.model_sizes import Split, read_sizes
from megatron_adapters.engine import SampleResult

pytestmark = pytest.mark.distributed

DENSE = ("llama", "qwen2", "qwen3")
# Data parallelism shares out whole sequences, whatever the family: one is enough there.
JOBS = [
    Job(layout, "sampling_scenarios:family", family)
    for layout, families in {"TP1": DENSE, "TP2": DENSE, "TP2×DP2": ("qwen3",)}.items()
    for family in families
]
ALL = [Job(layout, "sampling_scenarios:all_scenarios", "qwen3") for layout in ("TP1", "TP2", "TP2×DP2")]
LOGPROB_TOLERANCE = 1e-4  # float32, natural log

Outcomes = Callable[[Job], dict[str, Any]]


@pytest.fixture(params=ALL, ids=str)
def sampled(request: pytest.FixtureRequest, outcome_of: Outcomes) -> dict[str, Any]:
    return outcome_of(request.param)


@pytest.fixture
def single(outcome_of: Outcomes) -> dict[str, Any]:
    return outcome_of(ALL[0])


@pytest.fixture(scope="session")
def generated(references: dict[str, Reference]) -> dict[tuple[str, str | None], list[np.ndarray]]:
    """Greedy tokens of transformers' generate, with and without peft's adapter."""
    from peft import PeftModel

    tokens: dict[tuple[str, str | None], list[np.ndarray]] = {}
    for family in DENSE:
        base = load_transformers(references[family].model_folder)
        tokens[family, None] = [generate(base, prompt) for prompt in prompts()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft on tied embeddings
            adapted = PeftModel.from_pretrained(base, str(references[family].adapter_folder)).eval()
        tokens[family, "peft"] = [generate(adapted, prompt) for prompt in prompts()]
    return tokens


def generate(model: Any, prompt: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].numpy()


def tokens_of(result: SampleResult) -> list[list[int]]:
    assert result.error is None, result.error
    return [sequence.tokens.tolist() for sequence in result.sequences]


@pytest.mark.parametrize("weights", [None, "peft"])
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_greedy_tokens_are_those_of_generate(job: Job, weights: str | None, outcome_of: Outcomes, generated) -> None:
    ours = [tokens_of(result)[0] for result in outcome_of(job)["greedy"][weights]]
    theirs = [tokens.tolist() for tokens in generated[job.family, weights]]
    assert ours == theirs
    assert len({tuple(tokens) for tokens in theirs}) == len(theirs)  # not all the same


def test_the_adapter_matters(generated) -> None:
    for family in DENSE:
        assert any((a != b).any() for a, b in zip(generated[family, None], generated[family, "peft"], strict=True))


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_sampled_and_prompt_logprobs_are_the_trainers(job: Job, outcome_of: Outcomes) -> None:
    scored = outcome_of(job)["logprobs"]
    results, training_logprobs = scored["results"], scored["training_logprobs"]
    sampler_gap = prompt_gap = 0.0
    trained = iter(training_logprobs)
    for prompt, result in zip(prompts(), results, strict=True):
        scores = result.prompt_logprobs
        assert scores.dtype == np.float32 and scores.shape == prompt.shape and np.isnan(scores[0])
        for sequence in result.sequences:
            expected = next(trained)
            assert sequence.logprobs.dtype == np.float32 and (sequence.logprobs < 0).all()
            sampler_gap = max(sampler_gap, np.abs(sequence.logprobs - expected[len(prompt) - 1 :]).max())
            if len(prompt) > 1:
                prompt_gap = max(prompt_gap, np.abs(scores[1:] - expected[: len(prompt) - 1]).max())
    print(f"\nSAMPLING {job} largest logprob gap to the trainer: sampled {sampler_gap:.1e}, prompt {prompt_gap:.1e}")
    assert sampler_gap <= LOGPROB_TOLERANCE and prompt_gap <= LOGPROB_TOLERANCE


def test_tokens_depend_on_the_seed_and_not_on_the_crowd(sampled) -> None:
    seeds = sampled["seeds"]
    assert tokens_of(seeds["alone"]) == tokens_of(seeds["crowd"])
    assert len({tuple(tokens) for tokens in tokens_of(seeds["alone"]) + tokens_of(seeds["other_seed"])}) == 8
    for mine, other in zip(seeds["alone"].sequences, seeds["crowd"].sequences, strict=True):
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=LOGPROB_TOLERANCE)


def test_layouts_draw_the_same_tokens(sampled, single) -> None:
    assert tokens_of(sampled["seeds"]["crowd"]) == tokens_of(single["seeds"]["crowd"])


def test_mixed_weights_in_one_batch_equal_each_alone(sampled) -> None:
    together, alone = sampled["mixed_weights"]["together"], sampled["mixed_weights"]["alone"]
    assert [tokens_of(result) for result in together] == [tokens_of(result) for result in alone]
    for mixed, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(
            mixed.sequences[0].logprobs, single.sequences[0].logprobs, atol=LOGPROB_TOLERANCE, rtol=0
        )
    assert len({tuple(tokens_of(result)[0]) for result in together}) == len(together)


def test_distributions_are_the_same_under_every_layout(sampled, single) -> None:
    for ours, alone in zip(sampled["distributions"], single["distributions"], strict=True):
        assert tokens_of(ours) == tokens_of(alone)
        mine, other = ours.prompt, alone.prompt
        length = len(mine.logprobs)
        close = {"atol": LOGPROB_TOLERANCE, "rtol": 0, "equal_nan": True}
        np.testing.assert_allclose(mine.logprobs, other.logprobs, **close)
        np.testing.assert_allclose(mine.targets, other.targets, **close)
        assert mine.targets.shape == (length - 1,) and mine.topk.token_ids.shape == (length, 4)
        pairs = [(mine.topk, other.topk), (mine.alternatives, other.alternatives)]
        pairs += [(a.topk, b.topk) for a, b in zip(ours.sequences, alone.sequences, strict=True)]
        for one, two in pairs:
            np.testing.assert_array_equal(one.token_ids, two.token_ids)
            np.testing.assert_allclose(one.logprobs, two.logprobs, **close)
        for row in range(length - 1):  # a token's logprob is one number, wherever it shows up
            likely = dict(zip(mine.topk.token_ids[row + 1].tolist(), mine.topk.logprobs[row + 1], strict=True))
            drawn = zip(mine.alternatives.token_ids[row].tolist(), mine.alternatives.logprobs[row], strict=True)
            assert all(abs(likely[token] - value) <= LOGPROB_TOLERANCE for token, value in drawn if token in likely)


def test_snapshots_do_not_move_with_their_adapter(sampled) -> None:
    outcome = sampled["snapshots_are_immutable"]
    first = outcome["before"].sequences[0]
    for name in ("after", "kept"):
        again = outcome[name].sequences[0]
        assert again.tokens.tolist() == first.tokens.tolist() and again.logprobs.tolist() == first.logprobs.tolist()
    assert outcome["late"].sequences[0].logprobs.tolist() != first.logprobs.tolist()
    assert "'early' are not loaded" in outcome["dropped"].error


SNAPSHOTS = [
    (Job("TP1", "sampling_scenarios:snapshot_memory", "qwen3"), Split()),
    (Job("TP2", "sampling_scenarios:snapshot_memory", "qwen3"), Split(tp_size=2)),
    (Job("TP1", "sampling_scenarios:snapshot_memory", "qwen3_moe"), Split()),
]


@pytest.mark.parametrize(("job", "split"), SNAPSHOTS, ids=str)
def test_what_a_snapshot_takes_is_planned_and_ranks_agree_when_it_is_too_much(
    job: Job, split: Split, outcome_of: Outcomes, references: dict[str, Reference]
) -> None:
    outcome = outcome_of(job)
    assert outcome["in_excess"] == {"by default": 0, "all": 3, "one": 1}, "the last rank's word counts"
    sizes = read_sizes(json.loads((references[job.family].model_folder / "config.json").read_text()))
    planned = planned_snapshots(sizes, split, PlannedJob(4, on_gpu=False, lora_rank=RANK), 0)
    print(f"{job}: {outcome['num_bytes']} bytes taken, {planned} planned")
    assert 0.95 * outcome["num_bytes"] <= planned <= 1.15 * outcome["num_bytes"]


def test_requests_join_while_others_run(sampled) -> None:
    outcome = sampled["arrivals"]
    whole, refused, joined, last = outcome["results"]
    assert len(tokens_of(whole)) == 5 and "expected 0 to 127" in refused.error
    assert tokens_of(joined) == tokens_of(outcome["alone"])
    assert len(tokens_of(last)[0]) == NEW_TOKENS
    assert outcome["finished"] == [1, 0, 2, 3]
