"""Sampling under every layout: transformers' tokens, the trainer's logprobs, and independence from the crowd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYOUTS
from gloo_launcher import run_ranks
from parity_reference import Reference, load_transformers
from sampling_scenarios import NEW_TOKENS, prompts

from megatron_adapters.engine import SampleResult

pytestmark = pytest.mark.distributed

FAMILIES = {"tp1": ("llama", "qwen2", "qwen3"), "tp2": ("llama", "qwen2", "qwen3"), "tp2dp2": ("qwen3",)}
"""Data parallelism shares out whole sequences, whatever the family: one is enough there."""
CASES = [(layout, family) for layout, families in FAMILIES.items() for family in families]
LOGPROB_TOLERANCE = 1e-4  # float32, natural log


@pytest.fixture(scope="session")
def sampled_under(
    references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """sampled_under("tp2") runs all scenarios under that layout, once per session."""
    done: dict[str, dict[str, Any]] = {}

    def outcome(name: str) -> dict[str, Any]:
        if name not in done:
            mine = {family: references[family] for family in FAMILIES[name]}
            folder = tmp_path_factory.mktemp(f"sampling-{name}")
            layout = LAYOUTS[name]
            done[name] = run_ranks("sampling_scenarios:run_all", layout.world_size, folder, mine, layout)
        return done[name]

    return outcome


@pytest.fixture
def sampled(sampled_under: Callable[[str], dict[str, Any]], layout_name: str) -> dict[str, Any]:
    return sampled_under(layout_name)


@pytest.fixture(scope="session")
def generated(references: dict[str, Reference]) -> dict[tuple[str, str | None], list[np.ndarray]]:
    """Greedy tokens of transformers' generate, with and without peft's adapter."""
    from peft import PeftModel

    tokens: dict[tuple[str, str | None], list[np.ndarray]] = {}
    for family in FAMILIES["tp1"]:
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
@pytest.mark.parametrize(("layout", "family"), CASES)
def test_greedy_tokens_are_those_of_generate(
    layout: str, family: str, weights: str | None, sampled_under, generated
) -> None:
    ours = [tokens_of(result)[0] for result in sampled_under(layout)["greedy"][family][weights]]
    theirs = [tokens.tolist() for tokens in generated[family, weights]]
    assert ours == theirs
    assert len({tuple(tokens) for tokens in theirs}) == len(theirs)  # not all the same


def test_the_adapter_matters(generated) -> None:
    for family in FAMILIES["tp1"]:
        assert any((a != b).any() for a, b in zip(generated[family, None], generated[family, "peft"], strict=True))


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_sampled_and_prompt_logprobs_are_the_trainers(layout: str, family: str, sampled_under) -> None:
    scored = sampled_under(layout)["logprobs"][family]
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
    print(
        f"\nSAMPLING {family} {layout} largest logprob gap to the trainer: "
        f"sampled {sampler_gap:.1e}, prompt {prompt_gap:.1e}"
    )
    assert sampler_gap <= LOGPROB_TOLERANCE and prompt_gap <= LOGPROB_TOLERANCE


def test_tokens_depend_on_the_seed_and_not_on_the_crowd(sampled) -> None:
    seeds = sampled["seeds"]
    assert tokens_of(seeds["alone"]) == tokens_of(seeds["crowd"])
    assert len({tuple(tokens) for tokens in tokens_of(seeds["alone"]) + tokens_of(seeds["other_seed"])}) == 8
    for mine, other in zip(seeds["alone"].sequences, seeds["crowd"].sequences, strict=True):
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=LOGPROB_TOLERANCE)


def test_layouts_draw_the_same_tokens(sampled, sampled_under: Callable[[str], dict[str, Any]]) -> None:
    assert tokens_of(sampled["seeds"]["crowd"]) == tokens_of(sampled_under("tp1")["seeds"]["crowd"])


def test_mixed_weights_in_one_batch_equal_each_alone(sampled) -> None:
    together, alone = sampled["mixed_weights"]["together"], sampled["mixed_weights"]["alone"]
    assert [tokens_of(result) for result in together] == [tokens_of(result) for result in alone]
    for mixed, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(
            mixed.sequences[0].logprobs, single.sequences[0].logprobs, atol=LOGPROB_TOLERANCE, rtol=0
        )
    assert len({tuple(tokens_of(result)[0]) for result in together}) == len(together)


def test_distributions_are_the_same_under_every_layout(sampled, sampled_under) -> None:
    for ours, single in zip(sampled["distributions"], sampled_under("tp1")["distributions"], strict=True):
        assert tokens_of(ours) == tokens_of(single)
        mine, other = ours.prompt, single.prompt
        length = len(mine.logprobs)
        close = {"atol": LOGPROB_TOLERANCE, "rtol": 0, "equal_nan": True}
        np.testing.assert_allclose(mine.logprobs, other.logprobs, **close)
        np.testing.assert_allclose(mine.targets, other.targets, **close)
        assert mine.targets.shape == (length - 1,) and mine.topk.token_ids.shape == (length, 4)
        pairs = [(mine.topk, other.topk), (mine.alternatives, other.alternatives)]
        pairs += [(a.topk, b.topk) for a, b in zip(ours.sequences, single.sequences, strict=True)]
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


def test_requests_join_while_others_run(sampled) -> None:
    outcome = sampled["arrivals"]
    whole, refused, joined, last = outcome["results"]
    assert len(tokens_of(whole)) == 5 and "expected 0 to 127" in refused.error
    assert tokens_of(joined) == tokens_of(outcome["alone"])
    assert len(tokens_of(last)[0]) == NEW_TOKENS
    assert outcome["finished"] == [1, 0, 2, 3]
