"""Jobs of the local executor: they outlive their client, end whole, and say why they ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import process_tree
from launch.cancel import cancel
from launch.job_spec import JobSpec
from launch.job_state import JobState, JobStatus
from launch.monitor import job_statuses
from launch.submit import submit
from launch.submitted import SubmittedJob
from tinker_hpc.config import ClusterProfile
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder

TINY_MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen3"
Submit = Callable[..., tuple[SubmittedJob, RunFolder]]


@pytest.fixture
def submit_command(tmp_path: Path) -> Iterator[Submit]:
    """Submit a command as the loop of a local run; whatever is left of it is ended after the test."""
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    jobs: list[SubmittedJob] = []

    def submit_one(*command: str, **changes: Any) -> tuple[SubmittedJob, RunFolder]:
        folder = RunFolder.new(root, "local")
        profile = changes.pop("cluster", ClusterProfile("local", executor="local"))
        spec = JobSpec(
            folder.run_id, "run", "local", str(TINY_MODEL), str(TINY_MODEL), profile, command=command, **changes
        )
        jobs.append(submit(spec, folder))
        return jobs[-1], folder

    yield submit_one
    for job in jobs:
        cancel([job])
        assert process_tree.of_run(job.run_id) == []


def wait_end(job: SubmittedJob, timeout_s: float = 60) -> JobStatus:
    deadline = time.monotonic() + timeout_s
    while not (status := job_statuses([job])[job.job_id]).state.finished:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


def wait_event(folder: RunFolder, event: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not (folder.events.exists() and f'"event": "{event}"' in folder.events.read_text()):
        assert time.monotonic() < deadline, f"no {event}"
        time.sleep(0.1)


def test_exit_code_and_setup_lines(submit_command: Submit) -> None:
    profile = ClusterProfile("local", executor="local", setup=("export FROM_SETUP='a b'",), environment={"ONE": "1"})
    job, folder = submit_command(
        "bash", "-c", 'echo "$FROM_SETUP $ONE $TWO $TINKER_BASE_URL"; exit 3', cluster=profile, environment={"TWO": "2"}
    )
    status = wait_end(job)
    assert (status.state, status.exit_code) == (JobState.FAILED, 3)
    assert (folder.logs / "loop.log").read_text().startswith("a b 1 2 http://127.0.0.1:")
    assert submit(JobSpec.from_json(read_json(folder.spec)), folder) == job, "a run is submitted once"


def test_cancel_ends_every_process(submit_command: Submit) -> None:
    # A loop that ignores TERM and leaves a daemon in a session of its own.
    job, folder = submit_command("bash", "-c", "setsid sleep 600 & trap '' TERM; sleep 600; sleep 600")
    wait_event(folder, "loop_started")
    assert job_statuses([job])[job.job_id].state is JobState.RUNNING
    assert len(process_tree.of_run(job.run_id)) >= 6  # controller, supervisor, gateway, agent, loop, sleepers
    write_json(folder.cancel, {})
    cancel([job])
    assert process_tree.of_run(job.run_id) == []
    status = wait_end(job)
    assert (status.state, status.reason) == (JobState.CANCELLED, "cancelled on request")
    assert read_json(folder.worker(0).status)["phase"] == "ended"


def test_what_is_left_when_the_controller_is_killed_is_ended(submit_command: Submit) -> None:
    job, folder = submit_command("sleep", "600")
    wait_event(folder, "loop_started")
    os.kill(int(job.job_id), 9)
    deadline = time.monotonic() + 60
    while job_statuses([job])[job.job_id].state is JobState.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cancel([job])
    assert process_tree.of_run(job.run_id) == []


def test_a_job_outlives_its_client(tmp_path: Path) -> None:
    """The client is a process of its own that is gone, with its session and its pipes, before the loop ends."""
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    client = (
        "import json, sys; from pathlib import Path\n"
        "from launch.job_spec import JobSpec; from launch.submit import submit\n"
        "from tinker_hpc.config import ClusterProfile; from tinker_hpc.run_folder import RunFolder\n"
        "folder = RunFolder.new(Path(sys.argv[1]), 'local')\n"
        "spec = JobSpec(folder.run_id, 'run', 'local', sys.argv[2], sys.argv[2],\n"
        "               ClusterProfile('local', executor='local'), command=('bash', '-c', 'sleep 4; echo outlived'))\n"
        "print(json.dumps(submit(spec, folder).to_json()))\n"
    )
    # capture_output waits for the end of the pipe: a job that inherited it would hold this up.
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", client, str(root), str(TINY_MODEL)],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    assert time.monotonic() - began < 4 or "outlived" not in done.stdout
    job = SubmittedJob.from_json(json.loads(done.stdout))
    status = wait_end(job)
    assert status.state is JobState.COMPLETED
    assert "outlived" in (RunFolder(Path(job.run_folder)).logs / "loop.log").read_text()
    assert process_tree.of_run(job.run_id) == []


@pytest.mark.parametrize(
    ("command", "changes", "says"),
    [
        (("no-such-program",), {}, "cannot start 'no-such-program'"),
        (("true",), {"working_folder": "/no/such/folder"}, "working folder /no/such/folder does not exist"),
    ],
)
def test_a_loop_that_cannot_start(
    submit_command: Submit, command: tuple[str, ...], changes: dict[str, Any], says: str
) -> None:
    job, folder = submit_command(*command, **changes)
    status = wait_end(job)
    assert status.state is JobState.FAILED and says in status.reason
    assert read_json(folder.outcome)["reason"] == "setup"


def test_a_gateway_that_cannot_start(submit_command: Submit, tmp_path: Path) -> None:
    folder = RunFolder.new(tmp_path / "root", "local")
    spec = JobSpec(
        folder.run_id,
        "run",
        "x",
        "/no/model",
        "/no/model",
        ClusterProfile("local", executor="local"),
        command=("true",),
    )
    status = wait_end(submit(spec, folder))
    assert status.state is JobState.FAILED and "the gateway could not start" in status.reason
    assert "config.json" in status.reason


def test_a_gateway_that_hangs_is_started_again(tmp_path: Path) -> None:
    """The supervisor as a process of its own, with its patience cut from a minute to two seconds."""
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    folder = RunFolder.new(root, "local")
    loop = (
        "import json, os, signal, sys, time, urllib.request\n"
        "first = json.load(open(sys.argv[1]))['pid']\n"
        "os.kill(first, signal.SIGSTOP)\n"
        "url = os.environ['TINKER_BASE_URL'] + '/api/v1/healthz'\n"
        "while json.load(open(sys.argv[1]))['pid'] == first: time.sleep(0.1)\n"
        "assert urllib.request.urlopen(url, timeout=20).status == 200\n"
    )
    spec = JobSpec(
        folder.run_id,
        "run",
        "local",
        str(TINY_MODEL),
        str(TINY_MODEL),
        ClusterProfile("local", executor="local"),
        command=(sys.executable, "-c", loop, str(folder.gateway)),
    )
    write_json(folder.spec, spec.to_json())
    folder.worker(0).create(base_model=str(TINY_MODEL), base_model_folder=str(TINY_MODEL))
    code = (
        "import sys; from pathlib import Path\n"
        "from launch import gateway_client, gateway_keeper\n"
        "gateway_keeper._PROBE_EVERY_S, gateway_keeper._HUNG_AFTER_S, gateway_client._TIMEOUT_S = 0.5, 3.0, 0.5\n"
        "from launch.node import Place; from launch.supervisor import supervise\n"
        "from tinker_hpc.run_folder import RunFolder\n"
        "sys.exit(supervise(RunFolder(Path(sys.argv[1])), Place('1', 0, 'here', 'local')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder.path)], timeout=100, check=False)
    assert done.returncode == 0, (folder.logs / "loop.log").read_text()
    events = folder.events.read_text()
    assert "gateway_hung" in events and "gateway_restarted" in events
    assert process_tree.of_run(folder.run_id) == []


@pytest.mark.slow
def test_time_limit(submit_command: Submit) -> None:
    """The least there is is a minute; the supervisor keeps it where there is no Slurm to do so."""
    job, folder = submit_command("sleep", "600", time_limit_min=1)
    status = wait_end(job, timeout_s=120)
    assert status.state is JobState.TIMEOUT and "`time`" in status.reason
    assert status.elapsed_s is not None and 59 < status.elapsed_s < 110
    assert read_json(folder.outcome)["reason"] == "time_limit"
