"""Results reach the disk behind the computing, in order, whatever the disk does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tinker_hpc.errors import DataRootError, LeaseLostError
from tinker_hpc.log import Bell, Lease, Record, ResultLog, ResultReader
from tinker_hpc.worker import publisher as publisher_module
from tinker_hpc.worker.publisher import Publisher


@pytest.fixture
def log(tmp_path: Path) -> ResultLog:
    return ResultLog(tmp_path, Lease.acquire(tmp_path / "lease", {}))


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[Bell]:
    bell = Bell(tmp_path, side="worker")
    yield bell
    bell.close()


def ns(folder: Path) -> list[int]:
    return [r.header["n"] for r in ResultReader(folder).poll() if "n" in r.header]


def test_everything_is_durable_in_order_after_flush(tmp_path: Path, log: ResultLog, bell: Bell) -> None:
    publisher = Publisher(log, bell)
    for n in range(50):
        publisher.publish(Record({"n": n}))
    publisher.flush()
    assert ns(tmp_path) == list(range(50))
    publisher.publish(Record({"n": 50}))
    publisher.close()
    assert ns(tmp_path) == list(range(51))


def test_computing_goes_on_while_the_disk_syncs(
    tmp_path: Path, log: ResultLog, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, synced = log.publish, [], threading.Event()

    def slow(records: list[Record]) -> None:
        calls.append(len(records))
        assert synced.wait(60)
        real(records)

    monkeypatch.setattr(log, "publish", slow)
    publisher = Publisher(log, bell)
    for n in range(100):
        publisher.publish(Record({"n": n}))
    synced.set()
    publisher.close()
    assert ns(tmp_path) == list(range(100)) and len(calls) <= 2


def test_a_full_disk_is_waited_for_and_said_once(
    tmp_path: Path, log: ResultLog, bell: Bell, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, failures = log.publish, []

    def full(records: list[Record]) -> None:
        if len(failures) < 3:
            failures.append(1)
            raise DataRootError("cannot write x: No space left on device.", visible=False)
        real(records)

    monkeypatch.setattr(log, "publish", full)
    monkeypatch.setattr(publisher_module, "RETRY_S", 0.01)
    publisher = Publisher(log, bell)
    publisher.publish(Record({"n": 1}))
    publisher.close()
    assert ns(tmp_path) == [1]
    assert capfd.readouterr().err.count("No space left on device. 1 results wait; trying again.") == 1


def test_what_became_visible_is_not_published_twice(
    tmp_path: Path, log: ResultLog, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = log.publish

    def unclear(records: list[Record]) -> None:
        real(records)
        raise DataRootError("the folder could not be synced", visible=True)

    monkeypatch.setattr(log, "publish", unclear)
    publisher = Publisher(log, bell)
    publisher.publish(Record({"n": 1}))
    publisher.close()
    assert ns(tmp_path) == [1]


def test_a_lost_lease_ends_it(tmp_path: Path, log: ResultLog, bell: Bell) -> None:
    publisher = Publisher(log, bell)
    publisher.check()
    Lease.acquire(tmp_path / "lease", {})
    publisher.publish(Record({"n": 1}))
    with pytest.raises(LeaseLostError):
        publisher.flush()
    for ask in (publisher.check, publisher.flush, lambda: publisher.publish(Record({"n": 2}))):
        with pytest.raises(LeaseLostError):
            ask()


def test_a_stuck_disk_stops_the_computing_instead_of_filling_the_memory(
    tmp_path: Path, log: ResultLog, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), log.publish
    monkeypatch.setattr(log, "publish", lambda records: (gate.wait(), real(records)))
    monkeypatch.setattr(publisher_module, "QUEUE_BYTES", 10_000)
    publisher = Publisher(log, bell)
    done = []

    def compute() -> None:
        for n in range(10):
            publisher.publish(Record({"n": n}, {"x": np.zeros(4000, np.uint8)}))
            done.append(n)

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and len(done) <= 7
    gate.set()
    thread.join(10)
    publisher.close()
    assert ns(tmp_path) == list(range(10))
