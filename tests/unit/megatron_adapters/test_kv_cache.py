"""Lanes: room is reserved before a sequence starts, a full cache says wait, freed room is used again."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_adapters.kv_cache import KvCache, KvShape, Lane

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))


def make_cache(**changes) -> KvCache:
    return KvCache(**{"shape": SHAPE, "budget_tokens": 1024, "max_context": 512, "max_rows": 32, **changes})


def in_memory(cache: KvCache) -> int:
    return sum(group.num_rows * group.lane_tokens for group in cache.groups.values())


def test_bytes_per_token() -> None:
    assert SHAPE.bytes_per_token == 2 * 2 * 2 * 4 * 4


def test_full_cache_says_wait_and_a_release_makes_room() -> None:
    cache = make_cache()
    lanes = [cache.reserve(100) for _ in range(8)]  # 128 tokens each
    assert all(lanes) and cache.reserve(100) is None and cache.reserve(1) is None
    assert lanes[3] is not None
    cache.release(lanes[3])
    assert cache.reserve(128) is not None


def test_what_can_never_fit_is_known_before() -> None:
    assert make_cache().longest() == 512
    cache = make_cache(budget_tokens=300)
    assert cache.longest() == 300
    assert cache.reserve(301) is None
    assert cache.reserve(300) is not None, "a lane may be shorter than its power of two when the budget is"


def test_idle_rows_of_other_lengths_are_given_up() -> None:
    cache = make_cache()
    short = [cache.reserve(60) for _ in range(16)]
    for lane in short:
        assert lane is not None
        cache.release(lane)
    assert in_memory(cache) == 1024
    assert cache.reserve(500) is not None and cache.reserve(500) is not None
    assert in_memory(cache) == 1024


def test_rows_are_not_given_up_where_that_makes_no_room() -> None:
    cache = make_cache()
    for _ in range(9):
        assert cache.reserve(60) is not None
    [group] = cache.groups.values()
    assert group.num_rows == 16 and cache.reserve(500) is None, "nine of 64 tokens leave 448"
    assert group.num_rows == 16
    cache.release(group.lanes[0])
    assert cache.reserve(500) is not None and group.num_rows == 8


def test_row_limit() -> None:
    cache = make_cache(max_rows=2)
    assert cache.reserve(1) and cache.reserve(200) and cache.reserve(1) is None


@pytest.mark.parametrize("seed", range(5))
def test_lanes_keep_their_contents_while_others_come_and_go(seed: int) -> None:
    """Random arrivals and departures; every live lane must still hold exactly what was written to it."""
    choose = random.Random(seed)
    cache = make_cache()
    live: dict[int, Lane] = {}
    for stamp in range(1, 300):
        if live and choose.random() < 0.45:
            cache.release(live.pop(choose.choice(list(live))), tainted=choose.random() < 0.3)
        elif (lane := cache.reserve(choose.choice([10, 64, 65, 200, 500]))) is not None:
            for tensors in (lane.group.keys_RHCD, lane.group.values_RHCD):
                for layer, tensor in enumerate(tensors):
                    tensor[lane.row] = stamp + layer / 10
            lane.group.mask_RC[lane.row, :7] = 0
            live[stamp] = lane
        assert in_memory(cache) <= cache.budget_tokens
        assert cache.num_live() == len(live)
        for group in cache.groups.values():
            assert [lane.row for lane in group.lanes] == list(range(len(group.lanes)))
        for written, lane in live.items():
            for layer in range(SHAPE.num_layers):
                assert (lane.group.keys_RHCD[layer][lane.row] == torch.tensor(written + layer / 10)).all()
                assert (lane.group.values_RHCD[layer][lane.row] == torch.tensor(written + layer / 10)).all()
            assert (lane.group.mask_RC[lane.row] == 0).sum() == 7
    for lane in live.values():
        cache.release(lane)
    cache.drop_unused()
    assert in_memory(cache) == 0


def test_a_tainted_lane_leaves_nothing_behind() -> None:
    cache = make_cache()
    first, second = cache.reserve(10), cache.reserve(10)
    assert first is not None and second is not None
    for tensor in first.group.values_RHCD:
        tensor[first.row] = float("nan")
        tensor[second.row] = 1.0
    cache.release(first, tainted=True)
    for tensor in second.group.values_RHCD:
        assert (tensor[second.row] == 1).all() and not tensor.isnan().any()
