"""Ranks that die come back to the same bits; workers that lose their lease stop."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from worker_driver import WorkerUnderTest, random_base

from tinker_hpc.log import Lease, Record, ResultReader

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def workers() -> Iterator[list[WorkerUnderTest]]:
    made: list[WorkerUnderTest] = []
    yield made
    for worker in made:
        worker.stop()


def story(worker: WorkerUnderTest, folder: Path) -> list[int]:
    """Everything that leaves state behind, on two models; the seqs to compare."""
    worker.create_model("a:0"), worker.create_model("b:0", rank=8, seed=2)
    seqs = []
    for step in range(4):
        seqs.append(worker.forward_backward("a:0", step))
        seqs.append(worker.forward_backward("a:0", 50 + step))
        fields = worker.pass_fields("b:0", step)
        fields["arrays"]["input.weights"][2] = float("nan")
        worker.send(**fields)
        seqs.append(worker.forward_backward("b:0", 90 + step))
        worker.optim_step("a:0"), worker.optim_step("b:0")
        if step == 1:
            saved = worker.send(
                "save_state", model_id="a:0", folder=str(folder / "ck"), path="tinker://a:0/w/ck", name="ck"
            )
            worker.ok(saved)
            worker.send("save_sampler_weights", model_id="b:0", sampling_session_id="snap")
            seqs.append(worker.sample("snap", seed=1, num_samples=2))
            source = {"folder": str(folder / "ck"), "path": "tinker://a:0/w/ck", "optimizer": True}
            worker.send("create_model", model_id="c:0", base_model="random/qwen3", from_state=source)
            seqs.append(worker.forward_backward("c:0", 7))
    seqs.append(worker.sample("snap", seed=2))
    seqs.append(worker.forward_backward("a:0", 9, forward_only=True))
    return seqs


def answers(worker: WorkerUnderTest, seqs: list[int]) -> list[Record]:
    return [worker.ok(seq) for seq in seqs]


def assert_same(found: list[Record], expected: list[Record]) -> None:
    """Samples to the token. Which passes of two models are computed together, and which samples decode side by side, is
    a matter of timing, and the last bits of a matrix product depend on the number of its rows; so numbers are close.
    That redoing gives the same bits is test_killed_at_any_moment_equals_uninterrupted's last part.
    """
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.header["op"] == theirs.header["op"]
        if mine.header["op"] == "sample":
            assert mine.arrays["tokens"].tolist() == theirs.arrays["tokens"].tolist()
        np.testing.assert_allclose(mine.arrays["logprobs"], theirs.arrays["logprobs"], atol=1e-4)


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    worker = WorkerUnderTest(folder / "w", base)
    try:
        worker.start()
        expected = answers(worker, story(worker, folder))
        worker.send("close")
        assert worker.wait_for_exit() == [0]
    finally:
        worker.stop()
    return expected


def check_answered_once(worker: WorkerUnderTest) -> None:
    records, reader = [], ResultReader(worker.path)
    while new := reader.poll():
        records += new
    answered = [record.header["seq"] for record in records if "ok" in record.header]
    assert len(answered) == len(set(answered))
    assert set(answered) == set(range(1, worker.log.last + 1)) - {worker.log.last}, "all but close"


def test_killed_at_any_moment_equals_uninterrupted(
    base: Path, workers: list[WorkerUnderTest], uninterrupted: list[Record], tmp_path: Path
) -> None:
    moments = random.Random(3)
    worker = WorkerUnderTest(tmp_path / "w", base)
    workers.append(worker)
    worker.start()
    seqs = story(worker, tmp_path)
    for kill_after in (4, len(seqs) // 2, None, None):  # so many of the results; or wherever it is, redo included
        if kill_after is not None:
            worker.ok(seqs[kill_after])
        time.sleep(moments.uniform(0, 0.1) if kill_after is not None else moments.uniform(3, 6))
        worker.processes[-1].send_signal(signal.SIGKILL)
        worker.processes[-1].wait()
        worker.start()
    assert_same(answers(worker, seqs), uninterrupted)

    def probe() -> list[bytes]:
        """What every model computes now, one at a time."""
        found = [worker.ok(worker.forward_backward(f"{m}:0", 70, forward_only=True)) for m in "abc"]
        return [record.arrays["logprobs"].tobytes() for record in found]

    before = probe()
    batches = [record.header["seqs"] for record in worker.records if record.header["op"] == "batch"]
    assert any(len(batch) > 1 for batch in batches)
    worker.processes[-1].send_signal(signal.SIGKILL)
    worker.processes[-1].wait()
    shutil.rmtree(worker.folder.snapshots, ignore_errors=True)  # so that all of it is computed again
    worker.start()
    assert probe() == before, "the recorded batches, mixed ones among them, give the same bits"
    worker.send("close")
    assert worker.processes[-1].wait(120) == 0
    check_answered_once(worker)
    steps = [line for line in worker.folder.metrics.read_text().splitlines() if '"a:0"' in line]
    assert len(steps) == 4, "redone steps do not repeat their line"


NO_ROOM = """
import megatron_adapters.adapter_room
megatron_adapters.adapter_room.SHARE = 0.0
"""


def test_an_adapter_whose_file_is_lost_is_restored(
    base: Path, workers: list[WorkerUnderTest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models and room for one: what somebody removes from TMPDIR is computed again."""
    (tmp_path / "sitecustomize.py").write_text(NO_ROOM)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    found = {}
    for name in ("whole", "lost"):
        worker = WorkerUnderTest(tmp_path / name, base, elastic=True, snapshot_interval_s=3600.0)
        workers.append(worker)
        worker.start()
        worker.create_model("a:0")
        worker.forward_backward("a:0", 1)
        worker.ok(worker.optim_step("a:0"))
        worker.ok(worker.create_model("b:0", seed=2))
        if name == "lost":
            [file] = (tmp_path / "tmp").glob("tinker_hpc-adapters-*/*")
            file.unlink()
        found[name] = worker.ok(worker.forward_backward("a:0", 2)).arrays["logprobs"]
        assert ("adapter 'a:0' was put away" in worker.stderr) == (name == "lost"), worker.stderr
        worker.send("close")
        assert worker.wait_for_exit() == [0]
    assert found["lost"].tobytes() == found["whole"].tobytes()


def test_passes_that_are_not_run_again_leave_their_neighbours_apart(
    base: Path, workers: list[WorkerUnderTest], tmp_path: Path
) -> None:
    """Between two passes stood one that only scored, or was refused: it is not run again, and what it kept apart then
    (or what ran without it) is computed as it was, to the bit."""
    worker = WorkerUnderTest(tmp_path / "w", base, snapshot_interval_s=3600)
    workers.append(worker)
    worker.start()
    for seed, model_id in enumerate(("a:0", "b:0", "c:0")):
        worker.ok(worker.create_model(model_id, rank=8, seed=seed))

    def short(model_id: str, seed: int) -> dict[str, Any]:
        """So few rows that a matrix product has other last bits than with more of them."""
        fields = worker.pass_fields(model_id, seed)
        cut = {name: values[:2] for name, values in fields["arrays"].items()} | {"offsets": np.array([0, 2])}
        return fields | {"arrays": cut}

    scored = worker.pass_fields("b:0", 2, forward_only=True)
    refused = worker.pass_fields("a:0", 4)
    refused["arrays"]["input.weights"][2] = float("nan")
    for fields in (
        (short("a:0", 1), scored, worker.pass_fields("c:0", 3)),
        (refused, short("b:0", 5), worker.pass_fields("a:0", 6)),
    ):
        seqs = worker.log.append([worker.request(**each) for each in fields])
        worker.bell.ring()
        for seq in seqs:
            worker.result(seq)
        assert seqs in [record.header.get("seqs") for record in worker.records], "one batch"

    def states() -> dict[str, bytes]:
        """Every bit of adapters and optimizers, after a step."""
        found = {}
        for model_id in ("a:0", "b:0", "c:0"):
            folder = tmp_path / f"{model_id[0]}-{len(worker.processes)}"
            fields = {"folder": str(folder), "path": f"tinker://{model_id}/weights/x", "overwrite": True}
            worker.ok(worker.send("save_state", model_id=model_id, **fields))
            for part in ("adapter_model", "optimizer"):
                tensors = load_file(folder / f"{part}.safetensors")
                found |= {f"{model_id} {part} {key}": values.tobytes() for key, values in tensors.items()}
        return found

    for model_id in ("a:0", "b:0", "c:0"):
        worker.ok(worker.optim_step(model_id))
    before = states()
    worker.processes[-1].kill()
    worker.processes[-1].wait()
    worker.start()
    after = states()
    assert {key for key in before if before[key] != after[key]} == set()
    worker.send("close")
    assert worker.processes[-1].wait(120) == 0
    check_answered_once(worker)


def test_the_elastic_agent_brings_a_killed_rank_back(
    base: Path, workers: list[WorkerUnderTest], tmp_path: Path
) -> None:
    """Two ranks; the one without the log is killed: the agent restarts both, and the run goes on as if nothing was."""
    calm = WorkerUnderTest(tmp_path / "calm", base, {"tp_size": 2, "dp_size": 1})
    worker = WorkerUnderTest(tmp_path / "w", base, {"tp_size": 2, "dp_size": 1}, elastic=True)
    workers += [calm, worker]
    calm.start()
    expected = answers(calm, story(calm, tmp_path / "calm"))
    calm.send("close")
    assert calm.wait_for_exit() == [0, 0]
    worker.start()
    seqs = story(worker, tmp_path / "w")
    worker.ok(seqs[5])
    agent = worker.processes[0].pid
    children = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    ranks = {rank_of(pid): pid for pid in children}
    os.kill(ranks[1], signal.SIGKILL)
    assert_same(answers(worker, seqs), expected)
    worker.send("close")
    assert worker.wait_for_exit() == [0], worker.stderr
    check_answered_once(worker)
    fences = {record.header["fence"] for record in worker.records}
    assert fences == {1, 2}


def test_a_rank_that_stands_still_is_replaced(base: Path, workers: list[WorkerUnderTest], tmp_path: Path) -> None:
    """Two ranks; one is stopped (SIGSTOP) in the middle. The other, waiting for it in a collective, ends when the time
    for a batch is over, and their agent starts both again. A second model, trained alike, gets the same bits.
    """
    worker = WorkerUnderTest(tmp_path / "w", base, {"tp_size": 2, "dp_size": 1}, elastic=True, hang_floor_s=8.0)
    workers.append(worker)
    worker.start()

    def train(model: str, *, stop_at: int | None) -> list[bytes | str]:
        worker.ok(worker.create_model(model))
        found: list[bytes | str] = []
        for step in range(4):
            if step == stop_at:
                agent = worker.processes[0].pid
                children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
                os.kill(next(int(pid) for pid in children if rank_of(int(pid)) == 1), signal.SIGSTOP)
            passed, stepped = worker.forward_backward(model, step), worker.optim_step(model)
            found += [worker.ok(passed).arrays["logprobs"].tobytes(), repr(worker.ok(stepped).header["metrics"])]
        return found

    unharmed = train("a:0", stop_at=None)
    assert train("b:0", stop_at=2) == unharmed
    assert "Timeout" in worker.stderr and "most recent call first" in worker.stderr, "and says where it waited"
    worker.send("close")
    assert worker.wait_for_exit() == [0], worker.stderr
    check_answered_once(worker)
    assert {record.header["fence"] for record in worker.records} >= {1, 2}


def test_ranks_do_not_outlive_their_agent(base: Path, workers: list[WorkerUnderTest], tmp_path: Path) -> None:
    worker = WorkerUnderTest(tmp_path / "w", base, elastic=True)
    workers.append(worker)
    worker.start()
    worker.ok(worker.create_model("a:0"))
    agent = worker.processes[0].pid
    ranks = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    assert ranks
    worker.processes[0].kill()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in ranks):
        assert time.monotonic() < deadline, "a rank lives on without its agent"
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    """Neither gone nor a zombie that nobody reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(line[5:]) for line in environment if line.startswith(b"RANK="))


def test_a_worker_that_is_superseded_stops_and_says_so(
    base: Path, workers: list[WorkerUnderTest], tmp_path: Path
) -> None:
    worker = WorkerUnderTest(tmp_path / "w", base)
    workers.append(worker)
    worker.start()
    worker.ok(worker.create_model("a:0"))
    Lease.acquire(worker.folder.lease, {"host": "elsewhere", "pid": 1, "agent": "elsewhere:1:1"})
    assert worker.processes[0].wait(60) == 1, "found out while idle"
    assert "lease 2 belongs to pid 1 on elsewhere. This worker stops writing results" in worker.stderr
    worker.start()  # as its agent would
    assert worker.processes[1].wait(120) == 1
    assert "taken over by pid 1 on elsewhere; this one is not started again" in worker.stderr


def test_a_damaged_request_log_ends_the_worker_and_names_the_place(
    base: Path, workers: list[WorkerUnderTest], tmp_path: Path
) -> None:
    worker = WorkerUnderTest(tmp_path / "w", base)
    workers.append(worker)
    worker.create_model("a:0")
    (segment,) = worker.folder.requests.glob("seg-*")
    content = bytearray(segment.read_bytes())
    content[100] ^= 1
    segment.write_bytes(bytes(content))
    worker.start()
    assert worker.processes[0].wait(120) == 1
    assert f"worker rank 0 ends: CorruptLogError: {segment} is corrupt at byte 0: checksum" in worker.stderr


def test_a_model_that_cannot_be_brought_back_says_so(
    base: Path, workers: list[WorkerUnderTest], tmp_path: Path
) -> None:
    """The checkpoint a model was loaded from was overwritten since: redoing the log would give other numbers."""
    worker = WorkerUnderTest(tmp_path / "w", base, snapshot_interval_s=3600)
    workers.append(worker)
    worker.start()

    def save() -> None:
        fields = {"folder": str(tmp_path / "ck"), "path": "tinker://a:0/weights/ck", "name": "ck", "overwrite": True}
        worker.ok(worker.send("save_state", model_id="a:0", **fields))

    worker.ok(worker.create_model("a:0"))
    save()
    source = {"folder": str(tmp_path / "ck"), "path": "tinker://a:0/weights/ck", "optimizer": True}
    worker.ok(worker.send("create_model", model_id="b:0", base_model="random/qwen3", from_state=source))
    for model_id in ("b:0", "a:0"):
        worker.forward_backward(model_id, 0), worker.ok(worker.optim_step(model_id))
    save()
    for how in (signal.SIGKILL, signal.SIGTERM):  # then from a snapshot that has b:0 with the overwritten weights
        worker.processes[-1].send_signal(how)
        worker.processes[-1].wait()
        pending = worker.forward_backward("b:0", 0)
        worker.start()
        header = worker.result(pending).header
        assert header["category"] == "server" and "model b:0 was lost when its worker was restarted" in header["error"]
        assert "has been overwritten since" in header["error"]
        worker.ok(worker.forward_backward("a:0", 1))
        later = worker.result(worker.optim_step("b:0")).header
        assert not later["ok"] and later["error"] == header["error"]
    worker.send("close")
    assert worker.processes[-1].wait(120) == 0
    check_answered_once(worker)
