"""retrieve_futures: what is told, once, in batches; after a restart; and of a worker that waits or has ended."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tinker_hpc.gateway.answers import Answer, failure
from tinker_hpc.gateway.completions import MAX_TOLD, Completions, target_of
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import Refusal
from tinker_hpc.gateway.replay import Replay
from tinker_hpc.gateway.retrieval import Retrieval
from tinker_hpc.gateway.wire import PROTOBUF
from tinker_hpc.gateway.workers import Status
from tinker_hpc.run_folder import RunFolder

SAMPLER = "s:sample:0"
OPEN = {
    "request_id": f"{SAMPLER}:open", "op": "open_sampler", "model_id": None, "seq_id": None, "digest": "d",
    "accepted_at": 1.0, "sampling_session_id": SAMPLER, "source": {"type": "base"},
}  # fmt: skip


def sample(seq_id: int, **more: Any) -> dict[str, Any]:
    header = {**OPEN, "request_id": f"{SAMPLER}:{seq_id}", "op": "sample", "seq_id": seq_id, "num_samples": 1}
    return header | more


def told(response: dict[str, Any]) -> list[str]:
    return [completion["request_id"].rpartition(":")[2] for completion in response["completions"]]


class Gateway:
    """Retrieval over a replayed log, and a worker in some phase."""

    def __init__(self, num_samples: int, phase: str = "ready") -> None:
        self.ledger = Ledger()
        self.ledger.replay([OPEN, *(sample(i) for i in range(num_samples))], 0)
        self.lost: str | None = None
        self.link = SimpleNamespace(status=Status(phase, "Slurm PENDING (Priority)"), hopeless=lambda: self.lost)
        workers: Any = SimpleNamespace(links={0: self.link})
        self.retrieval = Retrieval(self.ledger, workers, hold_s=5)

    def finish(self, *seq_ids: int, body: bytes = b"abc") -> None:
        for seq_id in seq_ids:
            self.ledger.futures.finish(f"{SAMPLER}:{seq_id}", Answer(PROTOBUF, body))

    async def ask(self, cursor: int = 0, *, copy: int = 0, timeout: float | None = 0, **more: Any) -> dict[str, Any]:
        target = {"type": "sampling_session", "sampling_session_id": SAMPLER, "cloned_sampler_id": copy}
        return await self.retrieval.completions({"target": target, "prev_cursor": cursor, "timeout": timeout, **more})


def test_finished_samples_are_told_once_seen_and_again_until_then():
    async def run() -> None:
        gateway = Gateway(3)
        assert (await gateway.ask())["completions"] == []
        gateway.finish(2, 0)
        first = await gateway.ask()
        assert first["completions"][0] == {
            "state": "finished", "request_id": f"{SAMPLER}:2", "response_payload_uncompressed_size": 3,
        }  # fmt: skip
        assert told(first) == told(await gateway.ask()) == ["2", "0"], "an answer may get lost on the way"
        gateway.ledger.futures.finish(f"{SAMPLER}:1", failure("no", "user"))
        second = await gateway.ask(first["cursor"])
        assert second["completions"] == [{"state": "failed", "request_id": f"{SAMPLER}:1"}]
        assert await gateway.ask(second["cursor"]) == {"completions": [], "cursor": second["cursor"]}

    asyncio.run(run())


def test_a_held_question_is_answered_as_soon_as_something_is_done():
    async def run() -> None:
        gateway = Gateway(2)
        asyncio.get_running_loop().call_later(0.05, gateway.finish, 1)
        started = time.monotonic()
        assert told(await gateway.ask(timeout=None)) == ["1"]
        assert time.monotonic() - started < 3

    asyncio.run(run())


def test_many_are_told_in_pieces_and_each_copy_of_a_client_hears_of_its_own():
    async def run() -> None:
        gateway = Gateway(MAX_TOLD + 10)
        gateway.ledger.apply(sample(3_000_000_005), 0)
        gateway.finish(*range(MAX_TOLD + 10), 3_000_000_005)
        first = await gateway.ask()
        second = await gateway.ask(first["cursor"])
        assert told(first) + told(second) == [str(i) for i in range(MAX_TOLD + 10)]
        assert told(await gateway.ask(copy=3)) == ["3000000005"]
        assert told(await gateway.ask(copy=4)) == []

    asyncio.run(run())


def test_a_restarted_gateway_tells_everything_again_whatever_the_cursor():
    async def run() -> None:
        gateway = Gateway(2)
        gateway.finish(0, 1)
        cursor = (await gateway.ask())["cursor"]
        for offset in (0, 10**18):  # the clock may even have gone back
            restarted = Gateway(2)
            restarted.finish(0, 1)
            assert told(await restarted.ask(cursor + offset)) == ["0", "1"]

    asyncio.run(run())


def test_answers_the_client_has_leave_the_memory():
    async def run() -> None:
        gateway = Gateway(2)
        gateway.finish(0, 1)
        foreign = "s:train:0:1"
        await gateway.ask(retrieved_request_ids=[f"{SAMPLER}:0", foreign, "unknown"])
        futures = gateway.ledger.futures
        assert futures.answer(f"{SAMPLER}:0") is None and futures.answer(f"{SAMPLER}:1") is not None
        future = futures.get(f"{SAMPLER}:0")
        assert future is not None and future.done

    asyncio.run(run())


def test_while_the_worker_is_queued_one_sample_is_sent_ahead_to_hear_the_reason(monkeypatch):
    monkeypatch.setattr("tinker_hpc.gateway.retrieval.SCOUT_AFTER_S", 0.05)

    async def run() -> None:
        gateway = Gateway(3, phase="queued")
        first = await gateway.ask(timeout=None)
        assert first["completions"] == [{"state": "finished", "request_id": f"{SAMPLER}:0"}]
        assert (await gateway.ask(first["cursor"], timeout=0.2))["completions"] == [], "one is enough"
        gateway.link.status = Status("ready")
        gateway.finish(0, 1, 2)
        assert told(await gateway.ask(first["cursor"])) == ["1", "2"], "the scout asks for itself"

    asyncio.run(run())


def test_a_loop_that_was_started_again_hears_of_what_its_predecessor_was_sent_ahead_with(tmp_path, monkeypatch):
    monkeypatch.setattr("tinker_hpc.gateway.retrieval.SCOUT_AFTER_S", 0.05)
    run_folder = RunFolder.new(tmp_path)
    run_folder.begin_loop()

    async def run() -> None:
        gateway = Gateway(2, phase="queued")
        workers: Any = None
        replay = Replay(run_folder, gateway.ledger, workers)
        futures = [future for future in gateway.ledger.futures if future.op == "sample"]
        for future in futures:
            future.loop_start = replay.start
        first = await gateway.ask(timeout=None)
        assert told(first) == ["0"] and told(await gateway.ask(first["cursor"], timeout=0.2)) == []
        run_folder.begin_loop()  # killed, and started again beside the same gateway
        await replay.look()
        for future in futures:
            replay.claim(future)
        assert told(await gateway.ask(timeout=None)) == ["1"], "it hears why it waits"
        gateway.link.status = Status("ready")
        gateway.finish(0, 1)
        assert "0" in told(await gateway.ask())

    asyncio.run(run())


def test_a_worker_that_ends_fails_what_is_pending_and_wakes_the_question():
    async def run() -> None:
        gateway = Gateway(2)
        gateway.finish(0)
        cursor = (await gateway.ask())["cursor"]

        def end() -> None:
            gateway.lost = "job 7 was cancelled"
            gateway.ledger.futures.wake_pending(0)

        asyncio.get_running_loop().call_later(0.05, end)
        answer = await gateway.ask(cursor, timeout=None)
        assert answer["completions"] == [{"state": "failed", "request_id": f"{SAMPLER}:1"}]

    asyncio.run(run())


def test_a_refused_sample_is_told_as_failed():
    async def run() -> None:
        gateway = Gateway(0)
        gateway.ledger.apply(sample(0, op="rejected", asked="sample", error="no", category="user"), 0)
        assert (await gateway.ask())["completions"] == [{"state": "failed", "request_id": f"{SAMPLER}:0"}]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "expected a sampling session"),
        ({"target": {"type": "model"}}, 400, "expected a sampling session"),
        ({"target": {"sampling_session_id": SAMPLER, "cloned_sampler_id": "x"}}, 400, "cloned_sampler_id is 'x'"),
        ({"target": {"sampling_session_id": SAMPLER}, "prev_cursor": -1}, 400, "prev_cursor is -1"),
        ({"target": {"sampling_session_id": SAMPLER}, "timeout": -1}, 400, "timeout is -1"),
        ({"target": {"sampling_session_id": SAMPLER}, "retrieved_request_ids": [1]}, 400, "a list of texts"),
        ({"target": {"sampling_session_id": "other"}}, 404, "unknown sampler 'other'"),
    ],
)
def test_wrong_questions_are_refused(body, status, words):
    with pytest.raises(Refusal, match=words) as caught:
        asyncio.run(Gateway(0).retrieval.completions(body))
    assert caught.value.status == status


def test_a_request_that_was_not_accepted_is_forgotten():
    completions = Completions()
    target = target_of(SAMPLER, 0)
    completions.expect(target, "a")
    completions.forget(target, "a")
    completions.give_up(target)
    assert completions.after(target, 0) == ([], 0)
