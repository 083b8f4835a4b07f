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


def test_a_reason_is_told_in_words() -> None:
    held = JobStatus("8", JobState.PENDING, "PENDING", "JobHeldUser")
    assert phase_of(held, ready=False)[1].endswith("job 8: held; `scontrol release 8` lets it go")
    limited = JobStatus("8", JobState.PENDING, "PENDING", "QOSMaxJobsPerUserLimit")
    assert "a limit of your QOS is reached" in phase_of(limited, ready=False)[1]
    down = JobStatus("8", JobState.PENDING, "PENDING", "ReqNodeNotAvail, UnavailableNodes:n[1-4]")
    assert phase_of(down, ready=False)[1].endswith("nodes it needs are down, drained or reserved")


@pytest.mark.parametrize(
    "reason",
    [
        "QOSMaxWallDurationPerJobLimit",
        "AssocMaxWallDurationPerJobLimit",
        "QOSMaxGRESPerJob",
        "QOSMaxNodePerJobLimit",
        "AssocMaxCpuPerJobLimit",
        "QOSMaxMemoryPerNode",
        "QOSMaxCpuMinutesPerJobLimit",
        "QOSMinGRES",
        "QOSMinCpuNotSatisfied",
    ],
)
def test_a_limit_of_the_job_itself_does_not_pass(reason: str) -> None:
    said = phase_of(JobStatus("8", JobState.PENDING, "PENDING", reason), ready=False)[1]
    assert "it will not start as it is" in said and ("QOS" if reason.startswith("QOS") else "account") in said
    assert ("ask for more" if reason.startswith("QOSMin") else "ask for less") in said


@pytest.mark.parametrize("reason", ["AssocMaxJobsLimit", "QOSGrpGRES", "QOSMaxNodePerUserLimit", "AssocGrpCpuLimit"])
def test_a_limit_of_all_jobs_passes(reason: str) -> None:
    said = phase_of(JobStatus("8", JobState.PENDING, "PENDING", reason), ready=False)[1]
    assert said.endswith("it starts when other jobs of it end")


def test_a_successor_says_what_became_of_the_job_before_it() -> None:
    job = JobStatus("9", JobState.PENDING, "PENDING", "Priority")
    assert phase_of(job, ready=False, before="it was preempted")[1].endswith(
        "jobs of higher priority go first; it was preempted, and the run goes on in this one"
    )


def test_what_slurm_said_last_is_kept_while_it_is_away() -> None:
    away = JobStatus("8", JobState.UNKNOWN, reason="squeue failed: Connection refused.")
    last = phase_of(JobStatus("8", JobState.PENDING, "PENDING", "Priority"), ready=False)[:2]
    phase, reason, error = phase_of(away, ready=False, known=last)
    assert (phase, error) == ("queued", None)
    assert reason.startswith(
        "Slurm does not say how job 8 is (squeue failed: Connection refused); before that: Slurm P"
    )
    assert phase_of(away, ready=False, known=("ready", ""))[0] == "queued", "its heart does not beat any more"
    assert phase_of(away, ready=True, known=("ready", ""))[0] == "ready"


def test_the_loopback_address_never_goes_through_a_proxy() -> None:
    environ = {"http_proxy": "http://proxy:3128", "no_proxy": "cluster.edu,localhost"}
    bypass_proxy(environ)
    assert environ["no_proxy"] == "cluster.edu,localhost,127.0.0.1"
    assert environ["NO_PROXY"] == "127.0.0.1,localhost"
    bypass_proxy(environ)
    assert environ["no_proxy"] == "cluster.edu,localhost,127.0.0.1"
