"""Pipeline order, places of ranks and micro-batches: pure decisions that all ranks take alike."""

from __future__ import annotations

import pytest

from megatron_adapters.interface import Layout
from megatron_adapters.pipeline import schedule
from megatron_adapters.placement import place_of, stage_layers
from megatron_adapters.training_pass import plan_micro_batches


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("num_micro_batches", [0, 1, 3, 9])
def test_stages_never_wait_for_each_other_in_a_circle(num_micro_batches: int, num_stages: int) -> None:
    """Runs all stages against each other; a receive happens only after its send."""
    plans = [list(schedule(num_micro_batches, stage, num_stages, backward=True)) for stage in range(num_stages)]
    sent: set[tuple[str, int, int]] = set()  # what, micro-batch, stage that did it
    kept = [0] * num_stages
    while any(plans):
        moved = False
        for stage, plan in enumerate(plans):
            if not plan:
                continue
            what, index = plan[0]
            before = stage - 1 if what == "forward" else stage + 1
            if 0 <= before < num_stages and (what, index, before) not in sent:
                continue
            if what == "backward":
                assert ("forward", index, stage) in sent
            plan.pop(0)
            sent.add((what, index, stage))
            kept[stage] += 1 if what == "forward" else -1
            assert kept[stage] <= num_stages - stage  # activations kept at a time
            moved = True
        assert moved, plans
    assert len(sent) == 2 * num_micro_batches * num_stages


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 9, 20])
def test_stages_may_wait_until_what_they_sent_has_arrived(
    num_micro_batches: int, num_stages: int, backward: bool
) -> None:
    """links.py holds at most pp_size messages; here a message is only done when the other side has received it."""
    plans = [list(schedule(num_micro_batches, stage, num_stages, backward=backward)) for stage in range(num_stages)]
    sent: set[tuple[str, int, int]] = set()  # what, micro-batch, to which stage
    sending: list[list[tuple[str, int, int]]] = [[] for _ in range(num_stages)]
    done: set[tuple[str, int, int]] = set()
    computed: list[tuple[str, int, int] | None] = [None] * num_stages  # a result that waits for room to be sent
    while any(plans) or any(computed):
        moved = False
        for stage, plan in enumerate(plans):
            if computed[stage] is None and plan:
                what, index = plan[0]
                comes_from, goes_to = (stage - 1, stage + 1) if what == "forward" else (stage + 1, stage - 1)
                message = (what, index, stage)
                if 0 <= comes_from < num_stages and message not in sent:
                    continue
                plan.pop(0)
                done.add(message)
                moved = True
                if 0 <= goes_to < num_stages:
                    computed[stage] = (what, index, goes_to)
            while sending[stage] and sending[stage][0] in done:
                sending[stage].pop(0)
            message = computed[stage]
            if message is not None and len(sending[stage]) < num_stages:
                sending[stage].append(message)
                sent.add(message)
                computed[stage] = None
                moved = True
        assert moved, (plans, computed)


def test_places_are_megatrons() -> None:
    """Order tp-cp-ep-dp-pp (megatron/core/parallel_state.py): TP fastest, stages slowest."""
    layout = Layout(tp_size=2, dp_size=2, pp_size=2, ep_size=2)
    places = [place_of(rank, layout) for rank in range(layout.world_size)]
    assert [p.tp_rank for p in places] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [p.dp_rank for p in places] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [p.pp_rank for p in places] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [p.ep_rank for p in places] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [p.expert_copy for p in places] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert list(stage_layers(6, layout, 1)) == [3, 4, 5]


@pytest.mark.parametrize(
    ("num_layers", "sizes"), [(94, [23, 24, 24, 23]), (93, [23, 23, 24, 23]), (95, [23, 24, 24, 24]), (8, [2] * 4)]
)
def test_stages_are_unequal_where_they_must_be(num_layers: int, sizes: list[int]) -> None:
    stages = [stage_layers(num_layers, Layout(pp_size=4), rank) for rank in range(4)]
    assert sorted(len(stage) for stage in stages) == sorted(sizes)
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


def test_ranks_that_share_experts_run_equally_many_micro_batches() -> None:
    lengths, budget = [9, 9, 9, 2, 2], 10
    together = [plan_micro_batches(lengths, Layout(1, 4, 1, 4), rank, budget) for rank in range(4)]
    assert len({len(plan) for plan in together}) == 1
    assert sorted(index for plan in together for batch in plan for index in batch.members) == [0, 1, 2, 3, 4]
    few = [plan_micro_batches([9], Layout(1, 4, 1, 4), rank, budget) for rank in range(4)]
    assert sorted(few) == [[([], False)], [([], False)], [([], False)], [([0], False)]]
    assert [plan_micro_batches([9], Layout(1, 4), rank, budget) for rank in range(1, 4)] == [[], [], []]


def test_a_long_datum_is_long_for_all_that_share_its_experts() -> None:
    lengths, budget = [40, 9, 9, 9], 10
    apart = [plan_micro_batches(lengths, Layout(1, 4), rank, budget) for rank in range(4)]
    assert [[batch.is_long for batch in plan] for plan in apart] == [[True], [False], [False], [False]]
    together = [plan_micro_batches(lengths, Layout(1, 4, 1, 4), rank, budget) for rank in range(4)]
    assert [[batch.is_long for batch in plan] for plan in together] == [[True]] * 4
    tensor_parallel = plan_micro_batches(lengths, Layout(2, 1, 1, 2), 0, budget)
    assert [(batch.members, batch.is_long) for batch in tensor_parallel] == [
        ([0], True), ([1], False), ([2], False), ([3], False)
    ]  # fmt: skip
