"""The planner: layouts of models people name on machines people have, and its rules."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_configs import PUBLISHED

from launch.memory_model import (
    GIB,
    MARGIN,
    Job,
    activation_bytes_per_token,
    cache_bytes_per_token,
    fixed_memory,
    tokens_that_fit,
    workspace_bytes,
)
from launch.model_sizes import ModelSizes, Split, read_sizes
from launch.plan import GOOD_CONTEXT, Machine, Plan, Wish, make_plan, possible_layouts

JOB = Job(2, on_gpu=True)
MODELS = st.sampled_from(sorted(PUBLISHED))


def sizes(name: str) -> ModelSizes:
    return read_sizes(PUBLISHED[name])


def plan(name: str, machine: Machine, **more) -> Plan:
    made = make_plan(sizes(name), machine, **more)
    assert made is not None
    return made


def layout(made: Plan) -> tuple[int, int, int, int]:
    return made.tp_size, made.ep_size, made.pp_size, made.dp_size


@pytest.mark.parametrize(
    ("name", "machine", "expected"),
    [
        ("Qwen3-235B-A22B", Machine(2, 8, 80), (4, 16, 1, 4)),
        ("Qwen3-235B-A22B", Machine(4, 8, 80), (4, 16, 1, 8)),
        ("Llama-3.1-70B", Machine(1, 4, 80), (4, 1, 1, 1)),
        ("Llama-3.1-70B", Machine(1, 8, 80), (4, 1, 1, 2)),
        ("Qwen3-30B-A3B", Machine(1, 1, 141), (1, 1, 1, 1)),
        ("Qwen3-30B-A3B", Machine(1, 4, 80), (1, 2, 1, 4)),
        ("Qwen3-8B", Machine(1, 4, 80), (1, 1, 1, 4)),
        ("Llama-3.2-1B", Machine(1, 1, 24), (1, 1, 1, 1)),
        ("Llama-3.1-70B", Machine(2, 4, 40), (4, 1, 2, 1)),
        ("Qwen3-235B-A22B", Machine(2, 4, 80), (4, 8, 1, 2)),
        # Copies of the model that compute activations again would fit, and train 3,283, 4,408 and 8,193 tokens.
        ("Qwen3-32B", Machine(1, 3, 80), (1, 1, 3, 1)),
        ("Qwen3-30B-A3B", Machine(1, 6, 40), (2, 2, 3, 1)),
        ("Qwen3-30B-A3B", Machine(1, 12, 24), (4, 4, 1, 3)),
    ],
)
def test_known_cases(name: str, machine: Machine, expected: tuple[int, ...]) -> None:
    made = plan(name, machine)
    assert layout(made) == expected
    assert made.fits and made.token_budget >= 1024 and made.cache_tokens > 10_000
    assert made.memory.total <= machine.memory_gib * GIB * (1 - MARGIN) + 1
    assert json.loads(json.dumps(made.to_json()))["memory"]["total"] == made.memory.total


def test_memory_by_hand() -> None:
    """Llama-3.1-70B on 4 x 80 GB, every part from the published numbers."""
    made = plan("Llama-3.1-70B", Machine(1, 4, 80))
    norms = (2 * 80 + 1) * 8192
    assert made.memory.weights == 2 * ((70_553_706_496 - norms) // 4 + norms)
    assert made.memory.cache == made.cache_tokens * 80 * 2 * 2 * 128 * 2  # layers, k and v, 2 of 8 heads
    whole = fixed_memory(sizes("Llama-3.1-70B"), Split(), JOB)[1]
    assert whole == 16 * 32 * (8_847_360 + 4_096_000 + 136_448)
    everywhere = 16 * 32 * (80 * 7 * 8192 + 8192)  # A of q, k, v, gate, up and unembedding, B of o and down
    assert made.memory.adapters == everywhere + (whole - everywhere) // 4


def test_does_not_fit_and_says_what_would() -> None:
    made = plan("Qwen3-235B-A22B", Machine(1, 8, 40))
    assert not made.fits
    assert any("does not fit" in reason for reason in made.reasons)
    assert "It would fit on 2 such nodes." in made.reasons
    assert (
        "It would fit with 3 such GPUs on a node, or on 3 such nodes."
        in plan("Llama-3.1-70B", Machine(1, 1, 80)).reasons
    )
    assert plan("Llama-3.1-70B", Machine(1, 3, 80)).fits and plan("Llama-3.1-70B", Machine(3, 1, 80)).fits
    assert not plan("Llama-3.1-70B", Machine(1, 2, 80)).fits
    assert plan("Qwen3-235B-A22B", Machine(2, 8, 40)).fits
    assert "It would fit on 9 nodes with 8 such GPUs each." in plan("Qwen3-235B-A22B", Machine(1, 1, 11)).reasons
    assert plan("Qwen3-235B-A22B", Machine(9, 8, 11)).fits
    both = "It would fit on 4 nodes with 8 such GPUs each, or on 16 such nodes."
    assert both in plan("gpt-oss-120b", Machine(1, 3, 11)).reasons
    hopeless = plan("DeepSeek-V3", Machine(1, 1, 4))
    assert "not fit on 64 nodes with 8 such GPUs each either: take GPUs with more memory" in hopeless.reasons[-1]


@settings(deadline=None, max_examples=20)
@given(MODELS, st.builds(Machine, st.integers(1, 2), st.integers(1, 8), st.sampled_from([24, 48, 80])))
def test_what_does_not_fit_needs_more_than_may_be_filled(name: str, machine: Machine) -> None:
    made = plan(name, machine)
    assert made.fits == (made.memory.total <= machine.memory_gib * GIB * (1 - MARGIN) + 1)
    if not made.fits:
        assert made.memory.activations > 0 and made.memory.cache == 0
        assert f"a rank would hold {made.memory.total / GIB:.2f} GiB" in " ".join(made.reasons)


@settings(deadline=None, max_examples=10)
@given(MODELS, st.builds(Machine, st.integers(1, 3), st.integers(1, 8), st.sampled_from([4, 11, 16, 24, 40])))
def test_no_fewer_would_fit(name: str, machine: Machine) -> None:
    reason = plan(name, machine).reasons[-1]
    if plan(name, machine).fits:
        return
    if wider := re.search(r"with (\d+) such GPUs on a node", reason):
        fits = [plan(name, replace(machine, ranks_per_node=n)).fits for n in range(1, int(wider[1]) + 1)]
        assert fits[-1] and not any(fits[:-1])
    if both := re.search(r"on (\d+) nodes with (\d+) such GPUs each\.", reason):
        assert plan(name, replace(machine, nodes=int(both[1]), ranks_per_node=int(both[2]))).fits


@pytest.mark.parametrize("machine", [Machine(1, 1, 20, on_gpu=False), Machine(1, 2, 8, on_gpu=False)])
def test_on_cpus_says_how_much_memory_would_do(machine: Machine) -> None:
    reason = plan("Qwen3-8B", machine).reasons[-1]
    said = re.fullmatch(
        r"It would fit with (\d+) GiB of memory on a node \(--memory \1G\), or on \d+ such nodes\.", reason
    )
    assert said, reason
    least = int(said[1]) / machine.ranks_per_node
    assert plan("Qwen3-8B", replace(machine, memory_gib=least)).fits
    assert not plan("Qwen3-8B", replace(machine, memory_gib=least - 1)).fits


def test_fewer_gpus_may_fit() -> None:
    """Seven cut neither heads nor experts of gpt-oss-120b: stages alone, of which the first is too full."""
    reason = plan("gpt-oss-120b", Machine(1, 7, 48)).reasons[-1]
    assert (
        reason == "It would fit with 6 such GPUs on a node, which divide the model better than 7, or on 2 such nodes."
    )
    assert plan("gpt-oss-120b", Machine(1, 6, 48)).fits


def test_fewer_gpus_may_do_better() -> None:
    """An odd number cuts Llama-3.1-70B into stages, where an even one cuts its heads."""
    five, four = plan("Llama-3.1-70B", Machine(1, 5, 80)), plan("Llama-3.1-70B", Machine(1, 4, 80))
    assert five.reasons[-1] == (
        "4 of these GPUs on a node would do better, as they divide the model into fewer stages (1 instead of 5), keep "
        f"the activations and leave room for sequences of up to {four.longest_sequence} tokens: take --gpus-per-node 4."
    )
    assert (five.pp_size, five.recompute, four.pp_size, four.recompute) == (5, True, 1, False)
    for even in (Machine(1, 4, 80), Machine(1, 8, 80)):
        assert "do better" not in " ".join(plan("Llama-3.1-70B", even).reasons)
    copies = plan("Qwen3-8B", Machine(1, 7, 80))  # each holds the model: seven are faster than four
    assert "do better" not in " ".join(copies.reasons)


def test_reasons_say_why() -> None:
    made = plan("Qwen3-235B-A22B", Machine(2, 8, 80))
    text = " ".join(made.reasons)
    assert "437.90 GiB in bfloat16" in text and "16 ranks of 80 GiB" in text
    assert "Tensor parallel size 4: 2 would leave" in text
    assert "8 of the 128 experts of a layer; 8 would leave" in text
    assert f"up to {made.longest_sequence} tokens" in text


def test_reasons_say_what_another_layout_would_give() -> None:
    text = " ".join(plan("Qwen3-32B", Machine(1, 3, 80)).reasons)
    assert "3 pipeline stages: 1 would leave room for 3283 tokens at a time and 5310 in the KV cache." in text
    assert "1 would leave no room beside the weights" in " ".join(plan("Llama-3.1-70B", Machine(2, 4, 40)).reasons)
    longer = plan("Qwen3-30B-A3B", Machine(1, 12, 24), wish=Wish(tp_size=2, ep_size=4, pp_size=3)).longest_sequence
    assert (
        "context of 40960 needs more memory than this layout leaves. More ranks for a copy of the model "
        f"(--tp-size 2 --ep-size 4 --pp-size 3) would leave room for {longer}."
    ) in " ".join(plan("Qwen3-30B-A3B", Machine(1, 12, 24)).reasons)
    alone = plan("Qwen3-8B", Machine(1, 1, 24)).reasons[-1]
    assert alone.endswith("context of 40960 needs more memory than this layout leaves.")


def test_the_architecture_page_says_what_is_planned() -> None:
    page = " ".join((Path(__file__).parents[3] / "ARCHITECTURE.md").read_text().split())
    small, large = plan("Qwen3-8B", Machine(1, 1, 80)), plan("Llama-3.1-70B", Machine(1, 4, 80))
    assert (
        f"Qwen3-8B trains its whole context of {small.longest_sequence:,} tokens on one GPU of 80 GB and Llama-3.1-70B "
        f"{large.longest_sequence:,} tokens on four"
    ) in page


def test_wishes_are_kept() -> None:
    made = plan("Qwen3-8B", Machine(1, 4, 80), wish=Wish(tp_size=2))
    assert layout(made) == (2, 1, 1, 2) and "Tensor parallel size 2, as given." in made.reasons
    assert layout(plan("Qwen3-30B-A3B", Machine(1, 4, 80), wish=Wish(ep_size=2, pp_size=2))) == (1, 2, 2, 2)
    assert make_plan(sizes("Qwen3-8B"), Machine(1, 4, 80), wish=Wish(tp_size=3)) is None


def test_unknown_memory() -> None:
    """The layout is that of endless memory; what would fill the memory is not said."""
    made = plan("Qwen3-8B", Machine(1, 2, math.inf, on_gpu=False))
    assert layout(made) == (1, 1, 1, 2) and made.dtype == "float32" and made.fits
    assert made.token_budget == 4096 and "memory is not known" in made.reasons[0]
    assert made.reasons[-1].startswith("Whether that fits is not known") and "Give --memory" in made.reasons[-1]
    shown = made.to_json()
    assert {name for name, value in shown.items() if value is None} == {
        "capacity", "fits", "longest_sequence", "cache_tokens",
    }  # fmt: skip
    assert {name for name, value in shown["memory"].items() if value is None} == {"snapshots", "cache", "total"}
    assert shown["memory"]["weights"] == made.memory.weights


def test_more_adapters_leave_less_room() -> None:
    one = plan("Qwen3-8B", Machine(1, 1, 60))
    eight = plan("Qwen3-8B", Machine(1, 1, 60), num_adapters=8)
    assert eight.memory.adapters == 8 * one.memory.adapters
    assert eight.token_budget < one.token_budget
    assert plan("Qwen3-8B", Machine(1, 1, 60), lora_rank=8).memory.adapters * 4 == one.memory.adapters


def test_activations_that_do_not_fit_are_computed_again() -> None:
    """Llama-3.1-8B on a 24 GB card: 16 GB of weights leave no room to keep the activations of a thousand tokens."""
    small, large = plan("Llama-3.1-8B", Machine(1, 1, 24)), plan("Llama-3.1-8B", Machine(1, 1, 80))
    assert small.fits and small.recompute and small.token_budget >= 4096
    assert "computed again in the backward, which takes a third more time" in " ".join(small.reasons)
    assert not large.recompute and large.longest_sequence > large.token_budget
    assert f"beyond {large.token_budget} are computed again" in " ".join(large.reasons)
    kept, again = (
        activation_bytes_per_token(sizes("Llama-3.1-8B"), Split(), replace(JOB, recompute=recompute))
        for recompute in (False, True)
    )
    ends = (2 + 4) * 4096 + 2 * 2 * 4096  # embedding, final norm, the head's hidden states
    assert again == pytest.approx(32 * 4096 * 2 + ends) and kept > 15 * again  # of the layers, the input alone


@settings(deadline=None)
@given(MODELS, st.integers(1, 200), st.booleans())
def test_as_many_tokens_as_fit(name: str, room_gib: int, recompute: bool) -> None:
    job, split, room = replace(JOB, recompute=recompute), Split(), float(room_gib * GIB)
    tokens = int(tokens_that_fit(sizes(name), split, job, room, alone=True))

    def taken(tokens: int) -> float:
        per_token = activation_bytes_per_token(sizes(name), split, job)
        return per_token * tokens + workspace_bytes(sizes(name), split, job, tokens, alone=True)

    assert tokens == 0 or taken(tokens) <= room + 1
    assert taken(tokens + 1) > room - 1


def test_lora_per_expert_is_planned_for() -> None:
    """3.4 times the state of shared-outer on Qwen3-30B-A3B."""
    shared, own = (plan("Qwen3-30B-A3B", Machine(1, 1, 141), per_expert=own).memory.adapters for own in (False, True))
    assert shared == 16 * 32 * (14_450_688 + 835_584 + 153_984)
    assert own == 16 * 32 * (48 * 3 * 128 * (2048 + 768) + 835_584 + 153_984)


def test_activations_of_an_8b_layer() -> None:
    """0.15 MB a token and layer at hidden 4096, of which half is the MLP's."""
    per_layer = activation_bytes_per_token(sizes("Qwen3-8B"), Split(), JOB) / 36
    assert per_layer == pytest.approx(0.15e6, rel=0.05)
    assert cache_bytes_per_token(sizes("Qwen3-8B"), Split(), JOB) == 36 * 2 * 8 * 128 * 2


MACHINES = st.builds(
    Machine, nodes=st.sampled_from([1, 2, 3, 4]), ranks_per_node=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    memory_gib=st.sampled_from([16, 24, 40, 80, 141]),
)  # fmt: skip


@settings(deadline=None)  # a busy machine is no failure
@given(MODELS, MACHINES)
def test_every_plan_keeps_the_rules(name: str, machine: Machine) -> None:
    model, made = sizes(name), plan(name, machine)
    assert made.tp_size * made.pp_size * made.dp_size == machine.world_size
    assert machine.ranks_per_node % made.tp_size == 0, "tensor parallel groups stay within a node"
    assert (made.tp_size * made.dp_size) % made.ep_size == 0
    assert model.num_kv_heads % made.tp_size == 0 or made.tp_size % model.num_kv_heads == 0
    assert made.pp_size <= model.num_layers
    assert made.ep_size == 1 or model.num_experts % made.ep_size == 0
    if made.fits:
        assert made.memory.total <= machine.memory_gib * GIB
    others = list(possible_layouts(model, machine, Wish()))
    assert Split(made.tp_size, made.ep_size, made.pp_size) in others


@settings(deadline=None)  # a busy machine is no failure
@given(MODELS, MACHINES)
def test_more_memory_never_hurts(name: str, machine: Machine) -> None:
    larger = Machine(machine.nodes, machine.ranks_per_node, machine.memory_gib * 2)
    if plan(name, machine).fits:
        assert plan(name, larger).fits
        assert plan(name, larger).pp_size <= plan(name, machine).pp_size


@settings(deadline=None, max_examples=50)
@given(MODELS, MACHINES)
def test_short_sequences_are_the_last_resort(name: str, machine: Machine) -> None:
    """Where activations are computed again and sequences are short all the same, no other layout does better."""

    def reach(made: Plan) -> int:
        return min(made.longest_sequence, made.cache_tokens)

    made = plan(name, machine)
    if not made.fits or not made.recompute or reach(made) >= min(GOOD_CONTEXT, sizes(name).max_context // 4):
        return
    for split in possible_layouts(sizes(name), machine, Wish()):
        other = plan(name, machine, wish=Wish(split.tp_size, split.ep_size, split.pp_size))
        assert not other.fits or reach(other) <= reach(made)


def test_the_planner_counts_with_the_workers_own_bounds() -> None:
    """It cannot import them: a login node plans without torch."""
    from launch import memory_model, plan
    from megatron_adapters import sampler, snapshot_room
    from tinker_hpc.worker import train_step

    assert (memory_model.CACHE_SHARE_GPU, memory_model.CACHE_SHARE_CPU) == (sampler.CUDA_SHARE, sampler.CPU_SHARE)
    assert memory_model.SNAPSHOT_SHARE == snapshot_room.SHARE
    assert (plan.MAX_ROWS, memory_model.MAX_SNAPSHOTS) == (sampler.MAX_ROWS, train_step.MAX_SNAPSHOTS)
