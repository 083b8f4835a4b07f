"""Queues of samples: within one in order of arrival, among them in turn."""

from __future__ import annotations

from collections import deque

import numpy as np

from megatron_adapters.sample_request import SampleRequest
from megatron_adapters.waiting_samples import Waiting, WaitingQueues


def queues(*asked: str | None, num_samples: int = 1) -> WaitingQueues:
    """Of requests of these weights, numbered as they arrive."""
    waiting = WaitingQueues()
    for index, snapshot_id in enumerate(asked):
        request = SampleRequest(snapshot_id, np.array([1], np.int32), num_samples, 6, seed=0)
        waiting.append(Waiting(index, request, deque(range(num_samples)), 6, scored=False))
    return waiting


def take(waiting: WaitingQueues, place: int = 0) -> int:
    """Start one sample of what is first in this queue. Returns the request's number."""
    one = waiting[place]
    one.samples.popleft()
    waiting.had_turn(place)
    return one.request_index


def test_queues_have_their_turns_however_much_waits_in_one() -> None:
    waiting = queues("a", "a", "a", "a", None, "b", None)
    assert len(waiting) == 3
    assert [take(waiting) for _ in range(7)] == [0, 4, 5, 1, 6, 2, 3]
    assert len(waiting) == 0


def test_samples_of_one_request_take_a_turn_each_time_some_are_started() -> None:
    waiting = queues("a", "b", "a", num_samples=2)
    assert [take(waiting) for _ in range(6)] == [0, 1, 0, 1, 2, 2]


def test_who_is_passed_over_stays_first_and_who_went_ahead_is_last() -> None:
    waiting = queues("a", "b", "c", "b")
    assert take(waiting, 1) == 1
    assert [waiting[place].request_index for place in range(3)] == [0, 2, 3]


def test_who_comes_anew_is_last() -> None:
    waiting = queues("a", "b", "b")
    assert take(waiting) == 0
    waiting.append(Waiting(3, SampleRequest("a", np.array([1], np.int32), 1, 6, seed=0), deque([0]), 6, scored=False))
    assert [take(waiting) for _ in range(3)] == [1, 3, 2]


def test_what_is_dropped_leaves_no_empty_queue() -> None:
    waiting = queues("a", "b", "b")
    waiting.drop(0)
    assert len(waiting) == 1 and waiting[0].request_index == 1
    waiting.drop(1)
    assert waiting[0].request_index == 2
    waiting.drop(None)
    assert len(waiting) == 0
