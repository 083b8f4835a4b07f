"""The pure parts of a session: what the gateway is told about its worker, and the proxy."""

from __future__ import annotations

import pytest

from launch.job_state import JobState, JobStatus
from tinker_hpc.service import bypass_proxy
from tinker_hpc.worker_watch import phase_of


@pytest.mark.parametrize(
    ("job", "ready", "phase", "words"),
    [
        (JobStatus("8", JobState.PENDING, "PENDING", "Priority"), False, "queued", "Slurm PENDING (Priority), job 8"),
        (JobStatus("8", JobState.PENDING, "PENDING"), False, "queued", "Slurm PENDING, job 8"),
        (JobStatus("8", JobState.RUNNING, "RUNNING", nodes=("n1",)), False, "starting", "job 8 runs on n1"),
        (JobStatus("8", JobState.RUNNING, "RUNNING"), True, "ready", ""),
        (JobStatus("8", JobState.UNKNOWN, reason="squeue: timed out"), True, "ready", ""),
        (JobStatus("8", JobState.UNKNOWN, reason="no answer"), False, "queued", "UNKNOWN (no answer)"),
        (JobStatus("8", JobState.COMPLETED, "COMPLETED"), True, "ended", "closed"),
        (JobStatus("8", JobState.TIMEOUT, "TIMEOUT", "TimeLimit"), True, "ended", "TimeLimit"),
    ],
)
def test_phases(job, ready, phase, words) -> None:
    found, reason, error = phase_of(job, ready=ready)
    assert found == phase
    assert words in reason
    # The gateway answers open futures with the error; a closed worker is not one.
    assert (error is not None) is (job.state.finished and not job.state.ok)
    assert error is None or (job.state.value in error and "8" in error)


def test_estimated_start_is_told() -> None:
    job = JobStatus("8", JobState.PENDING, "PENDING", "Resources", estimated_start=1_700_000_000.0)
    assert "estimated start" in phase_of(job, ready=False)[1]


def test_the_loopback_address_never_goes_through_a_proxy() -> None:
    environ = {"http_proxy": "http://proxy:3128", "no_proxy": "cluster.edu,localhost"}
    bypass_proxy(environ)
    assert environ["no_proxy"] == "cluster.edu,localhost,127.0.0.1"
    assert environ["NO_PROXY"] == "127.0.0.1,localhost"
    bypass_proxy(environ)
    assert environ["no_proxy"] == "cluster.edu,localhost,127.0.0.1"
