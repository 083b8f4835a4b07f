"""What the desk orders, on real logs. A model or sampler that redo cannot bring back takes nothing else down with it,
and stays lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinker_hpc.log import Bell, Lease, LogReader, Record, RequestLog, ResultLog, ResultReader
from tinker_hpc.run_folder import WorkerFolder
from tinker_hpc.worker import desk as desk_module
from tinker_hpc.worker.desk import Desk
from tinker_hpc.worker.parting import Parting
from tinker_hpc.worker.publisher import Publisher
from tinker_hpc.worker.ranks import Failure
from tinker_hpc.worker.recorded_experts import RecordedExperts
from tinker_hpc.worker.redo import Redo
from tinker_hpc.worker.rewinds import Rewinds
from tinker_hpc.worker.snapshot_files import Coverage

Compute = Callable[[Record], dict[str, Any] | Failure]


class NoSnapshots:
    """Nothing is due."""

    def order(self, *, parting: bool = False) -> None: ...

    def changed(self) -> None: ...

    def take_notes(self) -> list[dict[str, Any]]:
        return []


class Run:
    """A worker's folder and logs, and one desk after the other on them; what it orders is computed by a function."""

    def __init__(self, path: Path) -> None:
        self.folder = WorkerFolder(path)
        self.folder.create(base_model="m", base_model_folder="/nowhere")
        self.log = RequestLog(self.folder.requests)
        self.ids = itertools.count(1)
        self.seq_ids: dict[str, int] = {}

    def send(self, op: str, model_id: str | None = None, **fields: Any) -> int:
        arrays = {}
        if op == "forward_backward":
            arrays = {"tokens": np.arange(3), "offsets": np.array([0, 3])}
            fields["forward_only"] = False
        if model_id is not None and op != "create_model":
            fields["seq_id"] = self.seq_ids[model_id] = self.seq_ids.get(model_id, 0) + 1
        (seq,) = self.log.append(
            [Record({"op": op, "request_id": f"r{next(self.ids)}", "model_id": model_id, **fields}, arrays)]
        )
        return seq

    def worker(self, compute: Compute, held: Coverage | None = None) -> list[int]:
        """Start one, run everything there is, end it. Returns the seqs that were computed."""
        log = ResultLog(self.folder.path, Lease.acquire(self.folder.lease, {}))
        redo = Redo(held=held or Coverage())
        redo.learn(self.records())
        bell = Bell(self.folder.path, side="worker")
        publisher = Publisher(log, bell)
        snapshots: Any = NoSnapshots()
        desk = Desk(
            LogReader(self.folder.requests),
            publisher,
            bell,
            lease=log.lease,
            redo=redo,
            poison={},
            alone=(),
            budgets={},
            snapshots=snapshots,
            rewinds=Rewinds(self.folder),
            parting=Parting(),
            recorded=RecordedExperts(self.folder.path),
        )
        computed = []
        while orders := desk.next_orders():
            for request in orders[1:]:
                computed.append(request.header["seq"])
                outcome = compute(request)
                desk.finish(request, outcome if isinstance(outcome, Failure) else (outcome, {}))
        assert desk.coverage().open == frozenset() and desk._backlog == 0, "nothing is left over"
        publisher.close()
        bell.close()
        return computed

    def records(self) -> list[Record]:
        reader, found = ResultReader(self.folder.path), []
        while new := reader.poll():
            found += new
        return found

    def errors(self) -> dict[int, str | None]:
        """Of every answered request; each was answered once."""
        answers = [record.header for record in self.records() if "ok" in record.header]
        assert len(answers) == len({header["seq"] for header in answers})
        return {header["seq"]: header.get("error") for header in answers}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(desk_module, "LAG_S", 1.0)
    monkeypatch.setattr(desk_module, "SIGN_OF_LIFE_S", 0.1)
    run = Run(tmp_path)
    yield run
    run.log.close()


def test_a_record_that_is_in_the_log_twice_runs_once_and_leaves_nothing_over(run: Run) -> None:
    run.send("create_model", "a:0")
    run.send("optim_step", "a:0")
    for record in LogReader(run.folder.requests).poll():
        run.log.append([record])
    assert run.worker(as_saved) == [1, 2]
    assert run.worker(as_saved) == [1, 2]


def test_what_waits_for_something_that_fails_leaves_nothing_over(run: Run) -> None:
    run.send("create_model", "a:0")
    waited = [run.send("forward_backward", "a:0"), run.send("save_sampler_weights", "a:0", sampling_session_id="of a")]
    waited.append(run.send("sample", sampling_session_id="of a"))
    run.send("open_sampler", sampling_session_id="opened", source={})
    waited.append(run.send("sample", sampling_session_id="opened"))
    assert run.worker(lambda request: Failure("server", "no memory")) == [1, 5]
    assert run.worker(never) == [], "the same where they are known to have failed"
    assert all("no memory" in str(run.errors()[seq]) for seq in waited)


def as_saved(request: Record) -> dict[str, Any]:
    loads = request.header["op"] in ("load_state", "open_sampler") or "from_state" in request.header
    return {"checkpoint": ["r0", 1.0]} if loads else {}


def overwritten(request: Record) -> dict[str, Any]:
    return {"checkpoint": ["r9", 9.0]} if as_saved(request) else {}


def unreadable(request: Record) -> dict[str, Any] | Failure:
    return Failure("server", "Input/output error") if as_saved(request) else {}


def never(request: Record) -> dict[str, Any]:
    raise AssertionError(f"{request.header} was computed")


@pytest.mark.parametrize("how", [overwritten, unreadable])
def test_a_lost_model_with_recorded_batches_takes_nobody_along(run: Run, how: Compute) -> None:
    for model_id in ("a:0", "b:0"):
        run.send("create_model", model_id, **({"from_state": {}} if model_id == "b:0" else {}))
    mixed = [run.send("forward_backward", model_id) for model_id in ("a:0", "b:0")]
    steps = [run.send("optim_step", model_id) for model_id in ("a:0", "b:0")]
    run.worker(as_saved)
    assert mixed in [record.header.get("seqs") for record in run.records()], "one batch"
    fails, succeeds = run.send("forward_backward", "b:0"), run.send("forward_backward", "a:0")
    computed = run.worker(how)
    assert {mixed[0], steps[0], succeeds} <= set(computed), "a's batches are redone, the mixed one among them"
    assert not {mixed[1], steps[1], fails} & set(computed)
    errors = run.errors()
    assert "model b:0 was lost when its worker was restarted" in (errors.pop(fails) or "")
    assert set(errors.values()) == {None}


def test_a_lost_sampler_with_recorded_samples_takes_nobody_along(run: Run) -> None:
    run.send("open_sampler", sampling_session_id="kept", source={})
    run.send("open_sampler", sampling_session_id="lost", source={})
    samples = [run.send("sample", sampling_session_id=name) for name in ("lost", "kept")]
    run.worker(as_saved)
    fails, succeeds = (run.send("sample", sampling_session_id=name) for name in ("lost", "kept"))
    computed = run.worker(lambda r: overwritten(r) if r.header.get("sampling_session_id") == "lost" else as_saved(r))
    assert succeeds in computed and not {*samples, fails} & set(computed)
    errors = run.errors()
    assert "this sampler was lost when its worker was restarted" in (errors.pop(fails) or "")
    assert set(errors.values()) == {None}


def test_samplers_of_a_lost_model_fail_with_it_but_those_from_before(run: Run) -> None:
    run.send("create_model", "a:0")
    run.send("save_sampler_weights", "a:0", sampling_session_id="before")
    load = run.send("load_state", "a:0")
    run.send("save_sampler_weights", "a:0", sampling_session_id="after")
    for name in ("before", "after"):
        run.send("sample", sampling_session_id=name)
    run.worker(as_saved)
    kept, lost = (run.send("sample", sampling_session_id=name) for name in ("before", "after"))
    new = run.send("save_sampler_weights", "a:0", sampling_session_id="new")
    of_new = run.send("sample", sampling_session_id="new")
    assert kept in run.worker(overwritten)
    errors = run.errors()
    assert {seq for seq, error in errors.items() if error is not None} == {lost, new, of_new}
    assert all(f"request {load} (load_state) cannot be repeated" in str(errors[seq]) for seq in (lost, new, of_new))


@pytest.mark.parametrize("from_snapshot", [True, False])
def test_what_was_lost_stays_lost(run: Run, from_snapshot: bool) -> None:
    """Also where a snapshot holds the loading that could not be repeated (the model then has the overwritten weights),
    and where the file can be read again (the steps after it may be held by the snapshot, and are not in the model)."""
    run.send("create_model", "a:0")
    run.send("load_state", "a:0")
    run.worker(as_saved)
    first = run.send("optim_step", "a:0")
    run.worker(overwritten)
    second = run.send("optim_step", "a:0")
    computed = run.worker(never, Coverage(first)) if from_snapshot else run.worker(as_saved)
    assert second not in computed
    errors = run.errors()
    assert errors[second] == errors[first] and "model a:0 was lost" in str(errors[first])
