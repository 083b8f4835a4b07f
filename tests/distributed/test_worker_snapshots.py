"""A worker that starts from a snapshot is the one that was never interrupted: to the bit, and under another layout to
1e-5. Damaged and foreign snapshots are passed over.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_worker_redo import answers, assert_same, check_answered_once, story
from worker_driver import WorkerUnderTest, random_base

from tinker_hpc.log import LogReader, Record
from tinker_hpc.private_files import read_json
from tinker_hpc.worker.snapshot_files import NEEDED

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ONE: dict[str, Any] = {"tp_size": 1, "dp_size": 1}
TP2: dict[str, Any] = {"tp_size": 2, "dp_size": 1}
DP2: dict[str, Any] = {"tp_size": 1, "dp_size": 2}
Outcome = tuple[list[Record], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def workers() -> Iterator[list[WorkerUnderTest]]:
    made: list[WorkerUnderTest] = []
    yield made
    for worker in made:
        worker.stop()


def kill(worker: WorkerUnderTest) -> None:
    for process in worker.processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def ask_to_end(worker: WorkerUnderTest) -> None:
    """SIGTERM, as Slurm and the agent send it: to every rank, while a sample is under way. They put their state away,
    and end by the signal."""
    assert not snapshots(worker)
    under_way = worker.sample("base", seed=7, num_samples=8, max_tokens=100)
    worker.wait_for_batch_of(under_way)
    for process in worker.processes:
        process.terminate()
    assert {process.wait(60) for process in worker.processes} == {-signal.SIGTERM}, worker.stderr
    assert len(snapshots(worker)) == 1


def snapshots(worker: WorkerUnderTest) -> list[Path]:
    return sorted(path for path in worker.folder.snapshots.glob("[0-9]*") if path.is_dir())


def wait_for_snapshot_of(worker: WorkerUnderTest, seq: int, *, kept: int = 2) -> None:
    """Until the newest snapshot holds the request, and `kept` are there."""
    deadline, found = time.monotonic() + 60, snapshots(worker)
    while time.monotonic() < deadline:
        found = snapshots(worker)
        content = read_json(found[-1] / "snapshot.json") if found else None
        enough = len(found) >= kept and (kept < 2 or (worker.folder.snapshots / NEEDED).exists())
        if content and content["position"] >= seq and seq not in content["open"] and enough:
            return
        time.sleep(0.02)
    raise AssertionError(f"no snapshot of request {seq}: {found}\n{worker.stderr}")


def compact(worker: WorkerUnderTest) -> None:
    """As the gateway does once the log is large."""
    needed = read_json(worker.folder.snapshots / NEEDED)
    assert needed is not None
    assert worker.log.compact(needed["position"], frozenset(needed["open"]), keep_bytes=0) > 0
    requests = LogReader(worker.folder.requests).poll()
    assert any(request.header.get("compacted") and request.header["op"] == "forward_backward" for request in requests)


def starts(worker: WorkerUnderTest) -> list[dict[str, Any]]:
    worker.poll()
    return [record.header for record in worker.records if record.header["op"] == "worker_started"]


def first_half(worker: WorkerUnderTest) -> None:
    """Leaves pending gradients, moments, a sampler of older weights and one that failed to open.

    Each pass is waited for: passes of two models that wait together are computed together, and the last bits depend on
    it (test_worker_redo.py has that case).
    """
    worker.create_model("a:0"), worker.create_model("b:0", rank=8, seed=2)
    for step in range(3):
        worker.ok(worker.forward_backward("a:0", step)), worker.optim_step("a:0", grad_clip_norm=0.5)
        worker.ok(worker.forward_backward("b:0", step))
    worker.send("save_sampler_weights", model_id="a:0", sampling_session_id="snap")
    worker.send("open_sampler", sampling_session_id="base", source={"type": "base"})
    worker.forward_backward("a:0", 3), worker.optim_step("a:0")
    worker.ok(worker.forward_backward("a:0", 4))


def second_half(worker: WorkerUnderTest, folder: Path) -> Outcome:
    """Everything returned, and everything in the saved states of both models."""
    seqs = []
    for sampler in ("snap", "base"):  # waited for, as the passes are: what is sampled together is one batch
        seqs.append(worker.sample(sampler, seed=1))
        worker.ok(seqs[-1])
    for model_id in ("a:0", "b:0"):
        seqs += [worker.forward_backward(model_id, 5), worker.optim_step(model_id)]
        seqs.append(worker.forward_backward(model_id, 6))
        worker.ok(seqs[-1])
    tensors: dict[str, np.ndarray] = {}
    for model_id in ("a:0", "b:0"):
        target = folder / model_id.replace(":", "_")
        worker.ok(
            worker.send("save_state", model_id=model_id, folder=str(target), path=f"tinker://{model_id}/weights/x")
        )
        for name in ("adapter_model", "optimizer"):
            found = load_file(target / f"{name}.safetensors")
            tensors |= {f"{model_id}/{name}/{key}": values for key, values in found.items()}
    return [worker.ok(seq) for seq in seqs], tensors


def interrupted(
    base: Path,
    path: Path,
    workers: list[WorkerUnderTest],
    before: dict[str, Any],
    after: dict[str, Any],
    *,
    end: Callable[[WorkerUnderTest], None] = kill,
) -> tuple[WorkerUnderTest, list[Record], dict[str, np.ndarray]]:
    """The story with the end of every rank in the middle, and other ranks to go on. Where they were killed, the log has
    been compacted too: what both snapshots hold has no payload any more.
    """
    asked = end is ask_to_end
    worker = WorkerUnderTest(path / "w", base, before, snapshot_interval_s=3600 if asked else 0)
    workers.append(worker)
    worker.start()
    first_half(worker)
    if not asked:
        wait_for_snapshot_of(worker, worker.log.last)
    end(worker)
    if not asked:
        compact(worker)
    worker.layout = after
    worker._declare()
    worker.processes.clear()
    worker.start()
    if asked:
        worker.ok(worker.log.last)  # what was being sampled, by itself again
    returned, tensors = second_half(worker, path / "saved")
    assert starts(worker)[-1]["snapshot"] is not None
    return worker, returned, tensors


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Outcome]:
    """The same story without a kill, once per layout."""
    done: dict[str, Outcome] = {}

    def outcome(layout: dict[str, Any]) -> Outcome:
        if str(layout) not in done:
            path = tmp_path_factory.mktemp("calm")
            worker = WorkerUnderTest(path / "w", base, layout, snapshot_interval_s=3600)
            try:
                worker.start()
                first_half(worker)
                done[str(layout)] = second_half(worker, path / "saved")
            finally:
                worker.stop()
            assert not snapshots(worker)
        return done[str(layout)]

    return outcome


def numbers(records: list[Record]) -> list[Any]:
    return [[record.arrays[name].tobytes() for name in sorted(record.arrays)] for record in records] + [
        record.header.get("metrics") for record in records
    ]


@pytest.mark.parametrize("case", [(TP2, kill), (DP2, ask_to_end)], ids=["tp2-killed", "dp2-asked"])
def test_from_a_snapshot_equals_uninterrupted_to_the_bit(
    base: Path,
    workers: list[WorkerUnderTest],
    uninterrupted: Callable[[dict[str, Any]], Outcome],
    tmp_path: Path,
    case: tuple[dict[str, Any], Callable[[WorkerUnderTest], None]],
) -> None:
    """Weights, moments, returned numbers; the gradients pending at the snapshot and the older sampler among them.

    Whether the last snapshot is one of those taken now and then, or the one of a worker that was asked to end.
    """
    layout, end = case
    expected, expected_tensors = uninterrupted(layout)
    worker, returned, tensors = interrupted(base, tmp_path, workers, layout, layout, end=end)
    assert numbers(returned) == numbers(expected)
    assert tensors.keys() == expected_tensors.keys()
    for key, values in tensors.items():
        assert values.tobytes() == expected_tensors[key].tobytes(), key
    assert starts(worker)[-1]["num_redo_batches"] > 10, "all in the log, and yet none was computed again:"
    if end is ask_to_end:  # what was being sampled is begun anew, with the same draws
        batches = [record.header for record in worker.records if record.header["op"] == "batch"]
        under_way = [batch["seqs"][0] for batch in batches if batch["fence"] == 1][-1]
        again = worker.ok(worker.sample("base", seed=7, num_samples=8, max_tokens=100))
        assert numbers([worker.ok(under_way)]) == numbers([again])
    redone = [record.header["num_requests"] for record in worker.records if record.header["op"] == "redone"]
    assert redone == [0]
    assert len(worker.folder.metrics.read_text().splitlines()) == 6
    worker.send("close")
    assert set(worker.wait_for_exit()) == {0}
    check_answered_once(worker)


@pytest.mark.parametrize("change", [(DP2, TP2), (TP2, ONE)], ids=["dp2-tp2", "tp2-one"])
def test_another_layout_continues_the_same_training(
    base: Path,
    workers: list[WorkerUnderTest],
    uninterrupted: Callable[[dict[str, Any]], Outcome],
    tmp_path: Path,
    change: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    expected, expected_tensors = uninterrupted(change[0])
    _, returned, tensors = interrupted(base, tmp_path, workers, *change)
    for key, values in tensors.items():
        np.testing.assert_allclose(values, expected_tensors[key], rtol=1e-5, atol=1e-5, err_msg=key)
    for mine, theirs in zip(returned, expected, strict=True):
        if "logprobs" in mine.arrays:
            np.testing.assert_allclose(mine.arrays["logprobs"], theirs.arrays["logprobs"], atol=1e-5)


def test_the_optimizer_really_came_back(base: Path, workers: list[WorkerUnderTest], tmp_path: Path) -> None:
    """Resumed is not cold: the same weights with moments at zero take another step."""
    worker, _, tensors = interrupted(base, tmp_path, workers, ONE, ONE)
    weights = {key.rpartition("/")[2]: values for key, values in tensors.items() if key.startswith("a:0/adapter_model")}
    source = {"folder": str(tmp_path / "saved" / "a_0"), "path": "tinker://a:0/weights/x", "optimizer": False}
    worker.send("create_model", model_id="cold:0", base_model="random/qwen3", from_state=source)
    stepped = {}
    for model_id in ("a:0", "cold:0"):
        if model_id == "a:0":  # drop what is pending, so that both take the step of one and the same gradient
            worker.send("load_state", model_id="a:0", **(source | {"optimizer": True}))
        worker.forward_backward(model_id, 9), worker.optim_step(model_id)
        folder = tmp_path / model_id.replace(":", "_")
        worker.ok(
            worker.send("save_state", model_id=model_id, folder=str(folder), path=f"tinker://{model_id}/weights/y")
        )
        stepped[model_id] = load_file(folder / "adapter_model.safetensors")
    moved = {key: np.abs(stepped["a:0"][key] - values).max() for key, values in weights.items()}
    apart = {key: np.abs(stepped["a:0"][key] - stepped["cold:0"][key]).max() for key in weights}
    assert max(moved.values()) > 1e-3 and max(apart.values()) > 1e-3


def test_killed_anywhere_while_snapshots_are_taken(base: Path, workers: list[WorkerUnderTest], tmp_path: Path) -> None:
    """Back to back snapshots and kills at odd moments, half-written ones among them."""
    calm = WorkerUnderTest(tmp_path / "calm", base)
    worker = WorkerUnderTest(tmp_path / "w", base, snapshot_interval_s=0)
    workers += [calm, worker]
    calm.start()
    expected = answers(calm, story(calm, tmp_path / "calm"))
    kill(calm)
    worker.start()
    seqs = story(worker, tmp_path / "w")
    for kill_after in (3, len(seqs) // 2, len(seqs) - 3):
        worker.ok(seqs[kill_after])
        deadline = time.monotonic() + 5
        while not list(worker.folder.snapshots.glob(".writing-*")) and time.monotonic() < deadline:
            pass
        kill(worker)
        worker.processes.clear()
        worker.start()
    assert_same(answers(worker, seqs), expected)
    worker.send("close")
    assert worker.wait_for_exit() == [0]
    check_answered_once(worker)
    assert len(snapshots(worker)) <= 2
    assert any(start["snapshot"] for start in starts(worker)[1:]), starts(worker)
    modes = {path.stat().st_mode & 0o077 for path in worker.folder.snapshots.rglob("*")}
    assert modes == {0}, "nobody else reads them"


def test_a_damaged_snapshot_is_passed_over_and_named(
    base: Path,
    workers: list[WorkerUnderTest],
    uninterrupted: Callable[[dict[str, Any]], Outcome],
    tmp_path: Path,
) -> None:
    calm_returned, calm_tensors = uninterrupted(ONE)
    worker = WorkerUnderTest(tmp_path / "w", base, snapshot_interval_s=0)
    workers.append(worker)
    worker.start()
    first_half(worker)
    wait_for_snapshot_of(worker, worker.log.last)
    kill(worker)
    *_, older, newest = snapshots(worker)  # a third where the kill came before the oldest was cleared away
    damaged = newest / "adapters" / "0" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 4
    damaged.write_bytes(bytes(content))
    worker.processes.clear()
    worker.start()
    returned, tensors = second_half(worker, tmp_path / "saved")
    assert numbers(returned) == numbers(calm_returned)
    assert all(values.tobytes() == calm_tensors[key].tobytes() for key, values in tensors.items())
    assert f"snapshot {newest} is not used: {damaged} fails its checksum" in worker.stderr
    assert starts(worker)[-1]["snapshot"] == older.name
    kill(worker)
    for path in snapshots(worker):  # a purge that took them all
        shutil.rmtree(path)
    worker.processes.clear()
    worker.start()
    worker.ok(worker.forward_backward("a:0", 8))
    assert starts(worker)[-1]["snapshot"] is None
