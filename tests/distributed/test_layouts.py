"""Experts and pipeline stages beyond parity: states that any layout goes on with, EP degrees that do not show, ranks
without data, recomputed activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import Job
from layout_scenarios import FP8_BLOCK
from parity_reference import LENGTHS, Reference, load_transformers, logits_of, sequences
from parity_table import BOUNDS, JOBS, largest_gap
from sampling_scenarios import prompts
from test_properties import assert_same_bits, relative_gap
from test_sampling import LOGPROB_TOLERANCE, generate, tokens_of
from transformers import FineGrainedFP8Config, Mxfp4Config

pytestmark = pytest.mark.distributed

Outcomes = Callable[[Job], Any]

SAMPLING = [
    Job(layout, "layout_scenarios:greedy", family)
    for family, layouts in {
        "qwen3_moe": ("EP2", "TP2+EP2", "PP2", "PP2+EP2"),
        "gpt_oss": ("PP2", "TP2+EP2"),
        "deepseek_v3": ("PP2", "TP2+EP2"),
    }.items()
    for layout in layouts
]
MIXED = [Job(layout, "layout_scenarios:mixed_experts", "qwen3_moe") for layout in ("EP2", "TP2+EP2", "TP2+EP4")]
RESUMED = [
    Job(layout, "layout_scenarios:next_losses", family, given=Job("TP2+EP2", "layout_scenarios:state", family))
    for family, layouts in {
        "qwen3_moe": ("TP1", "PP2", "EP4", "PP2+EP2"),
        "gpt_oss": ("PP2",),
        "deepseek_v3": ("PP2",),
    }.items()
    for layout in layouts
]
# The same ranks with the experts on one, two or all of them.
DEGREES = [("DP2", "EP2"), ("TP2", "TP2+EP2"), ("TP2×DP2", "TP2+EP4"), ("EP2", "EP4")]
LITTLE = [Job(layout, "layout_scenarios:little_data", "qwen3_moe") for layout in ("EP2", "TP2+EP4")]
RECOMPUTED = [
    Job(layout, "layout_scenarios:recomputed", family)
    for layout, family in (("TP1", "qwen3"), ("TP1", "qwen3_moe"), ("EP2", "qwen3_moe"), ("PP2", "qwen3"))
]
LONG = [Job("EP2", "layout_scenarios:long_datum", "qwen3_moe")]
BFLOAT16 = [
    Job(layout, "layout_scenarios:in_bfloat16", family)
    for layout, family in (
        ("TP1", "qwen3_moe"),
        ("TP2+EP2", "qwen3_moe"),
        ("TP2+EP2", "gpt_oss"),
        ("TP2+EP2", "deepseek_v3"),
    )
]
QUANTISED = [
    Job(layout, "layout_scenarios:quantised", family)
    for layout, family in (("TP2+EP2", "gpt_oss"), ("TP2+EP2", "deepseek_v3"), ("TP2", "qwen3"))
]


@pytest.fixture(scope="module")
def generated(references: dict[str, Reference]) -> dict[str, list[list[int]]]:
    """Greedy tokens of transformers' generate on each family's base, from prompts of up to 64 tokens."""
    models = {family: load_transformers(references[family].model_folder) for family in {j.family for j in SAMPLING}}
    return {family: [generate(model, prompt).tolist() for prompt in prompts()] for family, model in models.items()}


@pytest.mark.parametrize("job", SAMPLING, ids=str)
def test_greedy_tokens_are_those_of_generate(
    job: Job, outcome_of: Outcomes, generated: dict[str, list[list[int]]]
) -> None:
    theirs, results = generated[job.family], outcome_of(job)
    assert [tokens_of(result)[0] for result in results[None]] == theirs
    assert [tokens_of(result)[0] for result in results["peft"]] != theirs  # the adapter matters


@pytest.mark.parametrize("job", MIXED, ids=str)
def test_experts_mix_what_is_live_and_no_other_adapters(job: Job, outcome_of: Outcomes) -> None:
    """Ranks that share experts sample for different adapters at once; a step of one alone is computed as such."""
    outcome = outcome_of(job)
    for mixed, single in zip(outcome["together"], outcome["alone"], strict=True):
        assert tokens_of(mixed) == tokens_of(single)
        gap = abs(mixed.sequences[0].logprobs - single.sequences[0].logprobs).max()
        assert gap <= LOGPROB_TOLERANCE
    assert len({tuple(tokens_of(result)[0]) for result in outcome["together"]}) == len(outcome["together"])
    assert outcome["told"] == {name: {(1, False)} for name in (None, "mix1", "mix2", "mix3")}


@pytest.mark.parametrize("job", RESUMED, ids=str)
def test_a_state_of_tp2_ep2_goes_on_elsewhere(job: Job, outcome_of: Outcomes) -> None:
    """The next five losses are those of the training that went on where it was."""
    assert job.given is not None
    expected = outcome_of(job.given)["next_losses"]
    assert expected[-1] < expected[0]
    gap = max(abs(a - b) for a, b in zip(outcome_of(job), expected, strict=True)) / sum(LENGTHS)
    print(f"\nPARITY state of TP2+EP2 under {job.layout}: loss per token {gap:.1e}")
    assert gap < 1e-5


def _at(layout: str) -> Job:
    [job] = [job for job in JOBS if (job.layout, job.family) == (layout, "qwen3_moe")]
    return job


@pytest.mark.parametrize("jobs", [tuple(map(_at, pair)) for pair in DEGREES], ids=[" ".join(pair) for pair in DEGREES])
def test_the_ep_degree_does_not_show(jobs: tuple[Job, Job], outcome_of: Outcomes) -> None:
    """The same adapter and data: logprobs, the gradient as a whole, and the losses of five steps.

    Single matrices are sums in another order of what cancels in part: 2e-6 of their largest entry, in float32. The
    norms of five steps are of such gradients, at weights that have gone apart by as much.
    """
    one, two = map(outcome_of, jobs)
    whole, difference = (
        torch.cat([grads.flatten() for grads in parts])
        for parts in (two["grads"].values(), [one["grads"][key] - x for key, x in two["grads"].items()])
    )
    gaps = {
        "losses": max(abs(a - b) / abs(b) for a, b in zip(one["losses"], two["losses"], strict=True)),
        "norms": max(abs(a - b) / b for a, b in zip(one["norms"], two["norms"], strict=True)),
        "logprobs": max(abs(a - b).max() / abs(b).max() for a, b in zip(one["logprobs"], two["logprobs"], strict=True)),
        "gradient": float(difference.norm() / whole.norm()),
    }
    assert relative_gap(one["grads"], two["grads"]) <= 1e-5
    print("\nPARITY", *jobs, {name: f"{value:.1e}" for name, value in gaps.items()})
    assert gaps.pop("norms") <= 3e-6
    assert max(gaps.values()) <= 1e-6, gaps


@pytest.mark.parametrize("job", LITTLE, ids=str)
def test_ranks_without_data_join_each_step(job: Job, outcome_of: Outcomes) -> None:
    result = outcome_of(job)
    assert result["losses"][1] == pytest.approx(result["losses"][0], rel=1e-6)
    assert result["forward_only"] == pytest.approx(result["first"], rel=1e-6)
    assert relative_gap(result["split"], result["joined"]) < 1e-5


@pytest.mark.parametrize("job", RECOMPUTED, ids=str)
def test_recomputed_activations_give_the_same_bits(job: Job, outcome_of: Outcomes) -> None:
    kept, recomputed = outcome_of(job)["kept"], outcome_of(job)["recomputed"]
    assert_same_pass(kept, recomputed)
    assert recomputed["saved_bytes"] < 0.5 * kept["saved_bytes"], "little is kept"


@pytest.mark.parametrize("job", LONG, ids=str)
def test_a_sequence_beyond_the_micro_batch_is_recomputed(job: Job, outcome_of: Outcomes) -> None:
    """On one of two ranks that share experts, so on both."""
    kept, some, everything = (outcome_of(job)[name] for name in ("kept", "some", "all"))
    assert_same_pass(some, everything)
    assert everything["saved_bytes"] < some["saved_bytes"] < kept["saved_bytes"]


def assert_same_pass(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["loss"] == two["loss"]
    assert all((a == b).all() for a, b in zip(one["logprobs"], two["logprobs"], strict=True))
    assert_same_bits(one["grads"], two["grads"])
    assert min(float(x.abs().max()) for x in one["grads"].values()) > 0


@pytest.mark.parametrize("job", BFLOAT16, ids=str)
def test_experts_train_in_bfloat16(job: Job, outcome_of: Outcomes, references: dict[str, Reference]) -> None:
    """Adapters and gradients stay float32, every matrix of every expert gets its gradient, and what is computed is the
    float32 model's up to bfloat16 (whose last bit is 2^-8; some tokens are routed otherwise).
    """
    result, exact = outcome_of(job), references[job.family]
    assert result["loss"] == pytest.approx(exact.losses[0], rel=0.03)
    assert result["grads"].keys() == exact.grads.keys()
    ours, theirs = (
        torch.cat([grads[key].flatten() for key in sorted(grads)]) for grads in (result["grads"], exact.grads)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9
    for key, gradient in result["grads"].items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any(), key
        assert not torch.equal(result["before"][key], result["after"][key]), key


@pytest.mark.parametrize("job", QUANTISED, ids=str)
def test_a_quantised_model_is_the_one_transformers_dequantises(
    job: Job, outcome_of: Outcomes, references: dict[str, Reference]
) -> None:
    """MXFP4 and FP8 in blocks, each rank reading its slices; and such a model trains."""
    result = outcome_of(job)
    quantisation = (
        Mxfp4Config(dequantize=True)
        if job.family == "gpt_oss"
        else FineGrainedFP8Config(dequantize=True, weight_block_size=FP8_BLOCK)
    )
    model = load_transformers(result["folder"], quantization_config=quantisation)
    theirs = [logits_of(model, s.tokens) for s in sequences()]
    assert largest_gap(result["base_logits"], theirs) <= BOUNDS.logits
    assert largest_gap(references[job.family].base_logits, theirs) > 0.1, "quantising rounds"
    assert all(gradient.isfinite().all() and gradient.any() for gradient in result["grads"].values())


def test_what_was_sent_to_the_next_stage_is_not_kept(outcome_of: Outcomes) -> None:
    assert outcome_of(Job("PP2", "layout_scenarios:many_sent", "qwen3"))["alive"] <= 2


def test_an_idle_cache_makes_room_for_adapters(outcome_of: Outcomes) -> None:
    """And stays where nothing of size is allocated, so that a step between two samples does not cost it."""
    held = outcome_of(Job("TP1", "layout_scenarios:cache_held", "qwen3"))
    assert {what for what, tokens in held.items() if tokens} == {"a sample", "a step", "saving"}
