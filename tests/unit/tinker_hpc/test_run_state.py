"""Own files and Slurm's word, put together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.job_state import JobState, JobStatus
from tinker_hpc.errors import DataRootError
from tinker_hpc.private_files import write_bytes, write_json
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.run_state import OwnFiles, RunStatus, combine, read_json_lines, read_metrics, read_own_files


def own(outcome=None, worker=None, submitted=True, has_result=False) -> OwnFiles:
    return OwnFiles(
        spec={"kind": "run", "name": "sft", "base_model": "m", "cluster": {"name": "della"}, "created_at": 5.0},
        submitted={"job_id": "8", "submitted_at": 6.0} if submitted else None,
        outcome=outcome,
        worker_status=worker,
        cancel_requested=False,
        has_result=has_result,
    )


def job(state: JobState, reason: str = "", **more) -> JobStatus:
    return JobStatus("8", state, state.value, reason, **more)


SUCCEEDED = {"state": "succeeded", "reason": "loop", "exit_code": 0, "ended_at": 9.0}


@pytest.mark.parametrize("after", [None, JobState.RUNNING, JobState.COMPLETED, JobState.TIMEOUT, JobState.CANCELLED])
def test_a_loop_that_succeeded_has_succeeded(after) -> None:
    status = combine("r", own(SUCCEEDED), job(after) if after else None)
    assert (status.state, status.exit_code, status.end) == (JobState.COMPLETED, 0, 9.0)


@pytest.mark.parametrize(
    ("reason", "after", "expected"),
    [
        ("loop", None, JobState.FAILED),
        ("loop", JobState.FAILED, JobState.FAILED),
        ("loop", JobState.OUT_OF_MEMORY, JobState.OUT_OF_MEMORY),
        ("signal", JobState.TIMEOUT, JobState.TIMEOUT),
        ("signal", JobState.PREEMPTED, JobState.PREEMPTED),
        ("signal", JobState.RUNNING, JobState.FAILED),
        ("cancelled", None, JobState.CANCELLED),
        ("cancelled", JobState.FAILED, JobState.CANCELLED),
        ("time_limit", JobState.FAILED, JobState.TIMEOUT),
    ],
)
def test_a_loop_that_was_killed_shows_what_killed_it(reason, after, expected) -> None:
    outcome = {"state": "failed", "reason": reason, "exit_code": 1, "error": "why"}
    assert combine("r", own(outcome), job(after) if after else None).state is expected


def test_a_waiting_job_shows_slurms_reason() -> None:
    status = combine("r", own(), job(JobState.PENDING, "Priority", estimated_start=99.0))
    assert (status.state, status.reason, status.estimated_start) == (JobState.PENDING, "Priority", 99.0)


def test_a_running_job_shows_what_its_worker_does() -> None:
    worker = {"phase": "starting", "reason": "loading m on 2 ranks"}
    assert combine("r", own(worker=worker), job(JobState.RUNNING)).reason == "loading m on 2 ranks"
    assert combine("r", own(worker=worker), None).state is JobState.RUNNING


def test_submitted_and_not_yet_asked_about() -> None:
    assert combine("r", own(), None).state is JobState.PENDING
    assert combine("r", own(submitted=False), None).state is JobState.UNKNOWN


def test_every_field_is_plain_json() -> None:
    import json

    status = combine("r", own(SUCCEEDED), job(JobState.COMPLETED, nodes=("n1", "n2")))
    text = json.dumps(status.to_json())
    assert RunStatus.from_json(json.loads(text)) == status
    assert json.loads(text)["nodes"] == ["n1", "n2"]
    assert json.loads(text)["state"] == "COMPLETED"


def test_own_files_of_a_real_folder(tmp_path: Path) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    assert read_own_files(folder) == OwnFiles({}, None, None, None, False, False)
    write_json(folder.spec, {"name": "x"})
    write_json(folder.cancel, {})
    write_bytes(folder.result, b"")
    folder.worker(0).create(base_model="m", base_model_folder="/m")
    write_json(folder.worker(0).status, {"phase": "ready"})
    assert read_own_files(folder) == OwnFiles({"name": "x"}, None, None, {"phase": "ready"}, True, True)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "line 1 column 2"), ("[1]", r"it holds \[1\], expected an object"), ("", "Expecting value")],
)
@pytest.mark.parametrize("name", ["run.json", "submitted.json", "outcome.json", "workers/0/status.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    folder.worker(0).create(base_model="m", base_model_folder="/m")
    (folder.path / name).write_text(content)
    with pytest.raises(DataRootError, match=f"{folder.path}/{name} of run {folder.run_id}: .*{complaint}.*backup"):
        read_own_files(folder)


def test_a_submitted_job_that_lacks_fields_is_damaged(tmp_path: Path) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    write_json(folder.submitted, {"job_id": "1", "cluster": "c", "submitted_at": 1.0})
    with pytest.raises(DataRootError, match=r"submitted\.json of run .*it has no run_id, executor, run_folder\."):
        read_own_files(folder)


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    write_json(folder.spec, {"name": "x"})

    def locked(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", locked)  # root, who runs the tests in CI, may read everything
    for read in (read_own_files, read_metrics, lambda run: read_json_lines(run.path, "events.jsonl")):
        with pytest.raises(DataRootError, match=f"cannot read {folder.path}.*: Permission denied"):
            read(folder)
    monkeypatch.setattr(Path, "exists", locked)
    with pytest.raises(DataRootError, match=f"cannot read {folder.spec} of run .*Permission denied"):
        RunFolder.find(tmp_path / "root", folder.run_id)


def test_a_run_whose_folder_was_removed_is_not_one_that_waits(tmp_path: Path) -> None:
    with pytest.raises(DataRootError, match=r"gone.*No such file"):
        read_own_files(RunFolder(tmp_path / "gone"))


def test_a_line_being_written_is_left_for_later(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    assert read_json_lines(tmp_path, "m.jsonl") == []
    file.write_text('{"step": 1}\nnot json\n{"step": 2}\n{"ste')
    assert read_json_lines(tmp_path, "m.jsonl") == [{"step": 1}, {"step": 2}]
