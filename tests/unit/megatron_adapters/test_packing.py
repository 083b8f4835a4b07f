"""Splitting and packing are pure: every datum once, within the budget, balanced, the same on every rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_adapters.packing import pack, smaller_budget, split_over_ranks

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 6))
def test_every_datum_goes_to_exactly_one_rank(lengths: list[int], dp_size: int) -> None:
    chosen = split_over_ranks(lengths, dp_size)
    assert len(chosen) == dp_size
    assert sorted(index for indices in chosen for index in indices) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 6))
def test_ranks_differ_by_at_most_the_longest_datum(lengths: list[int], dp_size: int) -> None:
    loads = [sum(lengths[i] for i in indices) for indices in split_over_ranks(lengths, dp_size)]
    assert max(loads) - min(loads) <= max(lengths)


def test_fewer_data_than_ranks_leaves_ranks_empty() -> None:
    assert split_over_ranks([5, 9], 4) == [[1], [0], [], []]


@given(LENGTHS, st.integers(1, 80))
def test_packing_keeps_every_datum_and_the_budget(lengths: list[int], budget: int) -> None:
    batches = pack(range(len(lengths)), lengths, budget)
    assert sorted(index for members in batches for index in members) == list(range(len(lengths)))
    for members in batches:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= budget


@given(LENGTHS)
def test_no_two_micro_batches_would_fit_into_one(lengths: list[int]) -> None:
    budget = 60
    sizes = sorted(sum(lengths[i] for i in members) for members in pack(range(len(lengths)), lengths, budget))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


def test_equal_lengths_pack_in_the_order_given() -> None:
    assert pack([0, 1, 2, 3, 4], [10] * 5, 25) == [[0, 1], [2, 3], [4]]


@given(LENGTHS, st.integers(1, 200))
def test_a_budget_that_did_not_fit_is_halved_down_to_single_sequences(lengths: list[int], budget: int) -> None:
    def largest(budget: int) -> int:
        return max(sum(lengths[i] for i in members) for members in pack(range(len(lengths)), lengths, budget))

    tried = [budget]
    while (smaller := smaller_budget(lengths, tried[-1])) is not None:
        assert largest(smaller) < largest(tried[-1]), "every try needs less memory than the one before"
        tried.append(smaller)
    assert largest(tried[-1]) == max(lengths), "at last the longest sequence is by itself"
    assert len(tried) <= 2 + (max(sum(lengths), 1)).bit_length()
