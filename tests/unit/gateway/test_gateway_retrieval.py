"""Long polls: how long they hold, what they say meanwhile, where an answer comes from."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tinker_hpc.gateway.answers import Answer
from tinker_hpc.gateway.futures import FutureTable
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import Refusal
from tinker_hpc.gateway.retrieval import NotYet, Retrieval
from tinker_hpc.gateway.workers import Status

COMMON: dict[str, Any] = {"model_id": "s:train:0", "digest": "d", "accepted_at": 1.0}
CREATE = COMMON | {"request_id": "s:train:0:0", "op": "create_model", "seq_id": 0, "session_id": "s", "lora": {}}


def step(seq_id: int) -> dict[str, Any]:
    return COMMON | {"request_id": f"s:train:0:{seq_id}", "op": "optim_step", "seq_id": seq_id}


class Worker:
    """A worker link as Retrieval sees it."""

    def __init__(self, phase: str, reason: str = "") -> None:
        self.status = Status(phase, reason)
        self.lost: str | None = None
        self.asked: list[tuple[int, int]] = []

    def hopeless(self) -> str | None:
        return self.lost

    def find_answer(self, where: tuple[int, int], facts: Any) -> Answer | None:
        self.asked.append(where)
        return Answer("x", b"from the disk")


def asked(headers: list[dict], request_id: str, worker: Worker, *, iteration: int = 1, hold_s: float = 0.1, then=None):
    """The answer (or NotYet's body), and how long it took. `then(ledger)` runs while the poll is held."""

    async def run() -> tuple[Any, float]:
        ledger = Ledger()
        ledger.futures = FutureTable(max_answer_bytes=20)
        ledger.replay(headers, 0)
        workers: Any = SimpleNamespace(links={0: worker})
        retrieval = Retrieval(ledger, workers, hold_s=hold_s)
        if then is not None:
            asyncio.get_running_loop().call_later(0.02, then, ledger)
        started = time.monotonic()
        try:
            value: Any = await retrieval.answer(request_id, iteration)
        except NotYet as not_yet:
            value = not_yet.body
        return value, time.monotonic() - started

    return asyncio.run(run())


def test_a_result_wakes_the_poll():
    answer = Answer("x", b"done")
    got, seconds = asked(
        [CREATE],
        "s:train:0:0",
        Worker("ready"),
        hold_s=30,
        then=lambda ledger: ledger.futures.finish("s:train:0:0", answer),
    )
    assert got is answer and seconds < 5


def test_without_a_result_it_holds_and_says_try_again():
    body, seconds = asked([CREATE], "s:train:0:0", Worker("ready"))
    assert body == {"type": "try_again", "request_id": "s:train:0:0", "queue_state": "active"}
    assert 0.08 < seconds < 5


def test_the_first_poll_of_a_queued_worker_is_short(monkeypatch):
    monkeypatch.setattr("tinker_hpc.gateway.retrieval.FIRST_HOLD_S", 0.05)
    worker = Worker("queued", "Slurm PENDING (Resources)")
    first, short = asked([CREATE], "s:train:0:0", worker, iteration=0, hold_s=2)
    later, long = asked([CREATE], "s:train:0:0", worker, iteration=1, hold_s=2)
    assert first["queue_state_reason"] == later["queue_state_reason"] == "Slurm PENDING (Resources)"
    assert first["queue_state"] == "paused_capacity"
    assert short < 1.8 < long


def test_a_worker_that_ends_ends_the_poll():
    worker = Worker("ready")

    def end(ledger: Ledger) -> None:
        worker.lost = "job 7 was cancelled"
        ledger.futures.wake_pending(0)

    got, seconds = asked([CREATE], "s:train:0:0", worker, hold_s=30, then=end)
    assert got.body == b'{"error":"job 7 was cancelled","category":"server"}' and seconds < 5


def test_a_request_behind_one_that_never_came_says_which():
    body, _ = asked([CREATE, step(1), step(3)], "s:train:0:3", Worker("ready"))
    assert "request 3 of s:train:0 waits for request 2, which this client has not sent" in body["queue_state_reason"]
    body, _ = asked([CREATE, step(1), step(3)], "s:train:0:1", Worker("ready"))
    assert "queue_state_reason" not in body


def test_an_answer_that_left_the_memory_is_read_again():
    worker = Worker("ready")

    def both(ledger: Ledger) -> None:
        ledger.futures.finish("s:train:0:1", Answer("x", bytes(15)), (1, 7))
        ledger.futures.finish("s:train:0:2", Answer("x", bytes(15)), (1, 8))

    got, _ = asked([CREATE, step(1), step(2)], "s:train:0:1", worker, hold_s=30, then=both)
    assert got.body == b"from the disk" and worker.asked == [(1, 7)]


def test_a_refusal_that_left_the_memory_is_known_from_the_request():
    refused = COMMON | {"request_id": "s:train:0:1", "op": "rejected", "seq_id": 1, "asked": "optim_step"}
    headers = [CREATE, refused | {"error": "no", "category": "user"}, step(2)]
    worker = Worker("ready")

    def another(ledger: Ledger) -> None:
        ledger.futures.finish("s:train:0:2", Answer("x", bytes(19)))

    asked(headers, "s:train:0:2", worker, then=another)
    got, _ = asked(headers, "s:train:0:1", worker)
    assert got.body == b'{"error":"no","category":"user"}' and worker.asked == []


def test_an_id_nobody_got_is_refused():
    with pytest.raises(Refusal, match="never accepted it") as caught:
        asked([CREATE], "s:train:9:0", Worker("ready"))
    assert caught.value.status == 404
