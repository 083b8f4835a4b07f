"""Which data-parallel rank samples what; the collectives themselves run in tests/distributed."""

from __future__ import annotations

from megatron_adapters.sample_ranks import Shares


def test_fewer_requests_than_ranks_are_split_by_samples() -> None:
    assert Shares(4).deal([10]) == [[(0, range(2)), (1, range(2, 5)), (2, range(5, 7)), (3, range(7, 10))]]
    assert Shares(4).deal([2]) == [[(0, range(1)), (1, range(1, 2))]]


def test_whole_requests_go_to_the_least_loaded_rank() -> None:
    shares = Shares(2)
    parts = shares.deal([5, 1, 1, 1])
    assert [part[0][0] for part in parts] == [0, 1, 1, 1] and all(len(part) == 1 for part in parts)
    shares.done(0, 5)
    assert shares.loads == [0, 3]
    assert [part[0][0] for part in shares.deal([2, 2])] == [0, 0]


def test_every_sample_is_dealt_once() -> None:
    for dp_size in (1, 2, 3, 4):
        for counts in ([1], [7], [3, 8], [1] * 9):
            dealt = Shares(dp_size).deal(counts)
            for count, parts in zip(counts, dealt, strict=True):
                assert sorted(sample for _, samples in parts for sample in samples) == list(range(count))
