"""Acceptance where the disk gives no clear answer: the record is in the log, but is not known to stay there."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinker_hpc.gateway.futures import Future
from tinker_hpc.gateway.intake import Intake
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import Refusal
from tinker_hpc.gateway.replay import Replay
from tinker_hpc.gateway.workers import WorkerLink
from tinker_hpc.log import Lease, LogReader, Record, ResultLog
from tinker_hpc.log import segment as segment_module
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder

TINY = Path(__file__).parents[2] / "models" / "tiny-qwen3"


class Scene:
    """A gateway's intake on a worker's real logs; what the worker would answer is written by `answer`."""

    def __init__(self, root: Path) -> None:
        run = RunFolder.new(root, "r")
        self.folder = run.worker(0)
        self.folder.create(base_model="tiny", base_model_folder=str(TINY))
        write_json(self.folder.status, {"phase": "ready"})
        self.link = WorkerLink(self.folder, {}, Lease.acquire(root / "gateway.lease", {}))
        self.ledger = Ledger()
        workers: Any = None
        self.intake = Intake(self.ledger, Replay(run, self.ledger, workers))
        self.results = ResultLog(self.folder.path, Lease.acquire(self.folder.lease, {}))

    def requests(self) -> list[dict[str, Any]]:
        return [record.header for record in LogReader(self.folder.requests).poll()]

    def answer(self, header: dict[str, Any]) -> None:
        kept = {key: header[key] for key in ("request_id", "seq", "op", "model_id")}
        self.results.publish([Record({**kept, "ok": True, "metrics": {"loss": 1.5}})])

    def header(self, **changes: Any) -> dict[str, Any]:
        asked = {"request_id": "m:1", "op": "optim_step", "model_id": "m", "seq_id": 1, "digest": "d"}
        return {**asked, "accepted_at": time.time(), "adam": {}, **changes}

    def close(self) -> None:
        self.link.stop()
        self.intake.pool.shutdown()

    async def until(self, future: Future) -> None:
        deadline = time.monotonic() + 20
        while not future.done:
            assert time.monotonic() < deadline, "the result was not delivered"
            await asyncio.sleep(0.05)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


@pytest.fixture
def unclear(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While set, a folder of requests cannot be synced: after the name was made."""
    broken, real = threading.Event(), segment_module.fsync_folder

    def fsync_folder(folder: Path) -> None:
        if broken.is_set() and folder.name == "requests":
            raise OSError(5, "Input/output error")
        real(folder)

    monkeypatch.setattr(segment_module, "fsync_folder", fsync_folder)
    return broken


def test_a_record_the_worker_saw_is_answered_although_it_was_refused(scene: Scene, unclear: threading.Event) -> None:
    async def tell() -> None:
        scene.link.start(asyncio.get_running_loop(), scene.ledger.futures)
        unclear.set()
        for _ in range(2):  # and when it was tried again
            with pytest.raises(Refusal) as caught:
                await scene.intake.accept(scene.link, scene.header())
            assert caught.value.status == 503 and "not safe on the disk yet" in caught.value.message
        scene.answer(scene.requests()[0])
        await asyncio.sleep(1.5)  # the gateway reads results meanwhile
        unclear.clear()
        future = await scene.intake.accept(scene.link, scene.header())
        await scene.until(future)
        answer = scene.ledger.futures.answer(future.request_id)
        assert answer is not None and b'"loss":1.5' in answer.body.replace(b" ", b"")
        assert future.seq == 1, "a rewind takes back the first: that one ran"
        assert await scene.intake.accept(scene.link, scene.header()) is future

    asyncio.run(tell())
    assert [header["request_id"] for header in scene.requests()] == ["m:1"] * 3


def test_a_record_that_may_have_run_is_not_replaced_by_another(scene: Scene, unclear: threading.Event) -> None:
    async def tell() -> None:
        unclear.set()
        with pytest.raises(Refusal):
            await scene.intake.accept(scene.link, scene.header())
        unclear.clear()
        with pytest.raises(Refusal, match="accepted before as optim_step with another payload"):
            await scene.intake.accept(scene.link, scene.header(digest="e"))

    asyncio.run(tell())


def test_what_the_disk_refused_is_forgotten(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    async def tell() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(segment_module, "_write_all", full)
            with pytest.raises(Refusal, match="nothing was accepted"):
                await scene.intake.accept(scene.link, scene.header())
        assert len(scene.ledger.futures) == 0
        assert (await scene.intake.accept(scene.link, scene.header(digest="e"))).seq == 1

    asyncio.run(tell())
