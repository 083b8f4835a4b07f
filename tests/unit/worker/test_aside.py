"""Sampling snapshots on the disk: written once, brought back, lost with words when the disk lost them."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adapters.adapter_files import WEIGHTS_FILE, HostCopy
from tinker_hpc.errors import RequestError, WeightsError
from tinker_hpc.log import Record
from tinker_hpc.worker import checkpoint
from tinker_hpc.worker.aside import SnapshotsAside
from tinker_hpc.worker.checkpoint import Checkpoint
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks
from tinker_hpc.worker.train_step import TrainStep


class Engine:
    """Snapshots as the engine keeps them, each of one matrix."""

    def __init__(self) -> None:
        self.snapshots: dict[str, float] = {}
        self.num_copies = 0
        self.most = 1000

    def snapshots_in_excess(self, oldest_first: Sequence[str]) -> int:
        return min(len(oldest_first), max(0, len(self.snapshots) - self.most))

    def copy_snapshot(self, name: str) -> HostCopy:
        self.num_copies += 1
        return HostCopy({"name": name}, {"a": torch.full((2, 2), self.snapshots[name])}, {}, 0)

    def drop_snapshot(self, name: str) -> None:
        del self.snapshots[name]

    def load_snapshot(self, name: str, folder: Path) -> None:
        self.keep_snapshot(name, self.read_snapshot(folder))

    def keep_snapshot(self, name: str, value: float) -> None:
        self.snapshots[name] = value

    def read_snapshot(self, folder: Path) -> float:
        from safetensors.torch import load_file

        if not folder.exists():
            raise WeightsError(f"no folder {folder}.")
        return load_file(folder / WEIGHTS_FILE)["a"][0, 0].item()


def make(folder: Path) -> tuple[Any, SnapshotsAside]:
    engine: Any = Engine()
    return engine, SnapshotsAside(folder / "aside", engine, Ranks(None, 0, 1))


def test_a_snapshot_is_written_once_however_often_it_comes_and_goes(tmp_path: Path) -> None:
    engine, aside = make(tmp_path)
    engine.snapshots = {"s:sample:1": 3.5, "s:sample:2": 4.5}
    for _ in range(3):
        for name in ("s:sample:1", "s:sample:2"):
            aside.put(name)
        assert engine.snapshots == {}
        for name in ("s:sample:2", "s:sample:1"):
            aside.bring_back(name)
    assert engine.snapshots == {"s:sample:1": 3.5, "s:sample:2": 4.5} and engine.num_copies == 2
    aside.forget("s:sample:1")
    aside.flush()
    assert [path.name for path in (tmp_path / "aside").iterdir()] == ["s_sample_2"]


def test_a_snapshot_that_the_disk_has_not_is_refused_with_words(tmp_path: Path, capsys) -> None:
    engine, aside = make(tmp_path)
    engine.snapshots = {"one": 1.0}
    (tmp_path / "aside").write_text("a file where the folder should be")
    aside.put("one")
    with pytest.raises(RequestError, match=r"sampler one was set aside .* cannot be read back"):
        aside.bring_back("one")
    assert "could not be set aside" in capsys.readouterr().out


def test_beyond_what_is_kept_the_oldest_is_lost_and_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tinker_hpc.worker.train_step.MAX_SNAPSHOTS", 2)
    monkeypatch.setattr("tinker_hpc.worker.train_step.MAX_ASIDE", 3)
    engine, aside = make(tmp_path)
    step = TrainStep(engine, Ranks(None, 0, 1), "base", None, aside)
    for number in range(7):
        name = f"s{number}"
        engine.snapshots[name] = float(number)
        step._snapshot_of[name] = "m"
        step._keep_in_memory(name)
    assert list(step.samplers) == ["s5", "s6"] and set(engine.snapshots) == {"s5", "s6"}
    for lost in ("s0", "s1"):
        with pytest.raises(RequestError, match="m has saved 5 newer snapshots"):
            step.snapshot_for(lost)
    assert step.snapshot_for("s3") == "s3" and engine.snapshots == {"s6": 6.0, "s3": 3.0}
    assert step.state()["aside"] == {"s2": "m", "s4": "m", "s5": "m"}

    restarted = TrainStep(engine, Ranks(None, 0, 1), "base", None, make(tmp_path)[1])
    restarted._aside._engine = engine
    restarted.restore(step.state())
    assert restarted.snapshot_for("s2") == "s2" and engine.snapshots["s2"] == 2.0


def test_where_memory_is_short_of_all_those_used_longest_ago_leave_whosever_they_are(tmp_path: Path) -> None:
    engine, aside = make(tmp_path)
    engine.most = 3
    step = TrainStep(engine, Ranks(None, 0, 1), "base", None, aside)
    step.run(Record({"op": "open_sampler", "seq": 0, "sampling_session_id": "base", "source": {"type": "base"}}))
    source = save(tmp_path, "000001", 9.0)
    step.run(Record({"op": "open_sampler", "seq": 1, "sampling_session_id": "opened", "source": source}))
    for number, owner in enumerate("mnm"):
        engine.snapshots[f"s{number}"] = float(number)
        step._snapshot_of[f"s{number}"] = owner
        step._keep_in_memory(f"s{number}")
    assert list(step.samplers) == ["base", "s0", "s1", "s2"], "the bare base costs nothing"
    assert step.snapshot_for("opened") == "opened" and engine.snapshots == {"s1": 1.0, "s2": 2.0, "opened": 9.0}
    step.in_use = Counter(["s1"])
    assert step.snapshot_for("s0") == "s0" and engine.snapshots == {"s1": 1.0, "opened": 9.0, "s0": 0.0}
    engine.most = 0
    assert step.snapshot_for("s2") == "s2" and engine.snapshots == {"s1": 1.0, "s2": 2.0}, "these are needed now"
    assert step.state()["aside"] == {"s0": "m"} and step.snapshot_for("base") is None


def save(root: Path, name: str, value: float, *, request_id: str = "r") -> dict[str, str]:
    """A checkpoint of sampler weights, as open_sampler's source."""
    folder, temporary = root / name, root / f".{name}"
    temporary.mkdir(parents=True)
    HostCopy({"name": name}, {"a": torch.full((2, 2), value)}, {}, 0).write(temporary)
    path, lora = f"tinker://m/sampler_weights/{name}", {"rank": 1}
    fields: dict[str, Any] = {"kind": "sampler", "step": 0, "optimizer": False, "request_id": request_id, "lora": lora}
    checkpoint.publish(folder, temporary, Checkpoint(path=path, model_id="m", base_model="base", **fields))
    return {"type": "folder", "folder": str(folder), "path": path}


def test_of_samplers_opened_by_path_few_stay_in_memory_and_none_is_lost(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tinker_hpc.worker.train_step.MAX_SNAPSHOTS", 2)
    engine, aside = make(tmp_path)
    step = TrainStep(engine, Ranks(None, 0, 1), "base", None, aside)
    for number in range(9):
        source = save(tmp_path, f"{number:06d}", float(number))
        fields = {"op": "open_sampler", "seq": number, "sampling_session_id": f"s{number}", "source": source}
        step.run(Record(fields))
        assert step.snapshot_for("s0") == "s0", "what is used stays, however old"
    assert engine.snapshots == {"s0": 0.0, "s8": 8.0} and list(step.samplers) == ["s8", "s0"]
    assert step.snapshot_for("s1") == "s1" and engine.snapshots == {"s0": 0.0, "s1": 1.0}
    assert not (tmp_path / "aside").exists(), "their checkpoints are on the disk"

    restarted = TrainStep(engine, Ranks(None, 0, 1), "base", None, aside)
    restarted.restore(json.loads(json.dumps(step.state())))
    assert restarted.snapshot_for("s2") == "s2" and engine.snapshots == {"s1": 1.0, "s2": 2.0}
    save(tmp_path, "000003", 33.0, request_id="another")
    with pytest.raises(
        RequestError, match=r"sampler s3 made room .* tinker://m/sampler_weights/000003 has been overwritten"
    ):
        restarted.snapshot_for("s3")
    shutil.rmtree(tmp_path / "000004")
    with pytest.raises(
        RequestError, match=r"sampler s4 made room .* no checkpoint at tinker://m/sampler_weights/000004"
    ):
        restarted.snapshot_for("s4")
    assert engine.snapshots == {"s1": 1.0, "s2": 2.0}


def test_what_was_queued_before_a_rewind_is_never_written_over_what_comes_after(tmp_path: Path, monkeypatch) -> None:
    refused = threading.Event()

    def refuse(*_: Any) -> None:
        refused.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    engine, aside = make(tmp_path)
    engine.snapshots = {"m:sample:5": 1.0, "m:sample:6": 1.0}
    with monkeypatch.context() as full_disk:
        full_disk.setattr(HostCopy, "write", refuse)
        aside.put("m:sample:5"), aside.put("m:sample:6")
        assert refused.wait(10)
        aside.close()
    again = SnapshotsAside(tmp_path / "aside", engine, Ranks(None, 0, 1))
    again.keep_only(())
    time.sleep(1.2)  # longer than a write that a disk refused is put off
    assert list((tmp_path / "aside").iterdir()) == []
    engine.snapshots = {"m:sample:5": 2.0}
    again.put("m:sample:5")
    again.bring_back("m:sample:5")
    assert engine.snapshots == {"m:sample:5": 2.0}


class OneOfTwo(Ranks):
    """A rank beside another on which everything works."""

    def agree(self, failure: Failure | None) -> None:
        if failure is not None:
            raise EndWorker(f"rank 0 of 2 failed alone: {failure.message}", failure)


@pytest.mark.parametrize("sampler", ["set aside", "opened"])
def test_what_one_rank_alone_cannot_read_back_ends_the_worker(tmp_path: Path, monkeypatch, sampler: str) -> None:
    """As the failure of a sample it would go unnoticed, and the ranks would sample different requests."""
    monkeypatch.setattr("tinker_hpc.worker.train_step.MAX_SNAPSHOTS", 1)
    engine, ranks = make(tmp_path)[0], OneOfTwo(None, 0, 1)
    step = TrainStep(engine, ranks, "base", None, SnapshotsAside(tmp_path / "aside", engine, ranks))
    for number, name in enumerate(("set aside", "newer")):
        engine.snapshots[name] = float(number)
        step._snapshot_of[name] = "m"
        step._keep_in_memory(name)
    for name in ("opened", "another"):
        fields = {"op": "open_sampler", "seq": 0, "sampling_session_id": name, "source": save(tmp_path, name, 9.0)}
        step.run(Record(fields))
    assert set(engine.snapshots) == {"newer", "another"}

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(engine, "read_snapshot", refuse)
    with pytest.raises(EndWorker, match="failed alone: Input/output error"):
        step.snapshot_for(sampler)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("a mistake of ours")])
def test_a_snapshot_whose_copy_fails_is_still_there(tmp_path: Path, monkeypatch, capsys, error: Exception) -> None:
    monkeypatch.setattr("tinker_hpc.worker.train_step.MAX_SNAPSHOTS", 1)
    engine, aside = make(tmp_path)
    step = TrainStep(engine, Ranks(None, 0, 1), "base", None, aside)

    def snapshot(name: str, value: float) -> None:
        engine.snapshots[name] = value
        step._snapshot_of[name] = "m"
        step._keep_in_memory(name)

    def fail(_: str) -> HostCopy:
        raise error

    snapshot("old", 1.0)
    with monkeypatch.context() as short, contextlib.suppress(RuntimeError):
        short.setattr(engine, "copy_snapshot", fail)
        snapshot("newer", 2.0)
        snapshot("newest", 3.0)
        assert isinstance(error, torch.OutOfMemoryError) and capsys.readouterr().out.count("stay in memory") == 1
    assert step.snapshot_for("old") == "old" and engine.snapshots["old"] == 1.0 and step.state()["aside"] == {}
    snapshot("last", 4.0)
    assert "old" in step.set_aside and "old" not in engine.snapshots
    assert step.snapshot_for("old") == "old" and engine.snapshots == {"old": 1.0}


def test_an_unknown_sampler_is_refused_with_words(tmp_path: Path) -> None:
    engine, aside = make(tmp_path)
    with pytest.raises(RequestError, match="sampler 'nobody' is not known to this worker"):
        TrainStep(engine, Ranks(None, 0, 1), "base", None, aside).snapshot_for("nobody")


def test_what_is_recorded_of_a_load_is_what_was_loaded(tmp_path: Path, monkeypatch) -> None:
    """Another run saves over the checkpoint between its checksums and its reading."""
    engine, aside = make(tmp_path)
    step = TrainStep(engine, Ranks(None, 0, 1), "base", None, aside)
    source = save(tmp_path, "latest", 1.0)
    read, saved_over = engine.read_snapshot, iter(range(2, 99))

    def saved_over_first(times: int) -> None:
        left = iter(range(times))

        def race(folder: Path) -> float:
            if next(left, None) is not None:
                number = next(saved_over)
                save(tmp_path, "latest", float(number), request_id=f"r{number}")
            return read(folder)

        monkeypatch.setattr(engine, "read_snapshot", race)

    def open_sampler(name: str) -> Any:
        fields = {"op": "open_sampler", "seq": 0, "sampling_session_id": name, "source": source}
        return step.run(Record(fields))[0]["checkpoint"][0]

    saved_over_first(times=2)
    assert open_sampler("one") == "r3" and engine.snapshots == {"one": 3.0}
    saved_over_first(times=3)
    with pytest.raises(RequestError, match=r"sampler_weights/latest was saved over while it was read, 3 times"):
        open_sampler("two")
    assert engine.snapshots == {"one": 3.0} and "two" not in step.samplers
