"""The error of a job that ended before its work did: its class, and whether the message says what to do."""

from __future__ import annotations

import pickle

import pytest

from launch.failure import duration_text, error_for
from launch.job_spec import JobSpec
from launch.job_state import JobState, JobStatus
from tinker_hpc.config import ClusterProfile
from tinker_hpc.errors import (
    JobCancelledError,
    JobFailedError,
    JobNeverStartedError,
    JobNodeFailError,
    JobOutOfMemoryError,
    JobTimeLimitError,
)

SPEC = JobSpec("r-7", "run", "r", "m", "/m", ClusterProfile("della", memory="64G"), time_limit_min=480)
LOGS = ("/data/runs/r-7/logs/loop.log", "/data/runs/r-7/logs/worker-0.log")


def status(state: JobState, slurm_state: str | None = None, **more: object) -> JobStatus:
    values: dict[str, object] = {"nodes": ("gpu017",), "start": 1.0, "elapsed_s": 11520.0, **more}
    return JobStatus("48213", state, slurm_state or state.value, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (JobState.FAILED, JobFailedError),
        (JobState.CANCELLED, JobCancelledError),
        (JobState.TIMEOUT, JobTimeLimitError),
        (JobState.OUT_OF_MEMORY, JobOutOfMemoryError),
        (JobState.NODE_FAIL, JobNodeFailError),
        (JobState.PREEMPTED, JobFailedError),
        (JobState.LOST, JobFailedError),
    ],
)
def test_class_and_attributes(state: JobState, kind: type[JobFailedError]) -> None:
    error = error_for(status(state), SPEC, LOGS)
    assert type(error) is kind
    assert error.reason == state.value and error.log_paths == LOGS  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(error)).job_id == "48213"


def test_the_message_of_the_house_style() -> None:
    error = error_for(
        status(JobState.OUT_OF_MEMORY, "FAILED", peak_memory_gib=63.5),
        SPEC,
        LOGS,
        doing="request 118 (optim_step); last step 1400",
    )
    assert str(error) == (
        "job 48213 (run r-7) ended OUT_OF_MEMORY on gpu017 after 3 h 12 min during request 118 (optim_step); last step "
        "1400. Log: /data/runs/r-7/logs/loop.log. It asked for 64G of memory per node and used 63.5 GiB: ask for more "
        "with `memory`, or use more ranks."
    )


def test_slurms_own_words_are_kept() -> None:
    error = error_for(status(JobState.CANCELLED, "CANCELLED by 2001"), SPEC, LOGS)
    assert "ended CANCELLED by 2001 on gpu017" in str(error) and error.slurm_state == "CANCELLED by 2001"  # type: ignore[attr-defined]


def test_never_started() -> None:
    waiting = status(JobState.FAILED, reason="JobLaunchFailure", nodes=(), start=None, elapsed_s=None)
    error = error_for(waiting, SPEC, ())
    assert type(error) is JobNeverStartedError and "without ever starting. Reason: JobLaunchFailure." in str(error)
    cancelled = error_for(status(JobState.CANCELLED, nodes=(), start=None, elapsed_s=None), SPEC, ())
    assert type(cancelled) is JobCancelledError and "without ever starting" in str(cancelled)


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.RUNNING, JobState.UNKNOWN])
def test_the_supervisors_word_where_slurm_has_none(state: JobState) -> None:
    outcome = {"reason": "time_limit", "error": "the time limit of 480 min is over", "exit_code": 143}
    error = error_for(status(state), SPEC, LOGS, outcome=outcome)
    assert type(error) is JobTimeLimitError and "480 min: ask for more with `time`" in str(error)
    # What Slurm knows for sure is not overruled.
    assert type(error_for(status(JobState.NODE_FAIL), SPEC, LOGS, outcome=outcome)) is JobNodeFailError


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (11520, "3 h 12 min"), (190_800, "2 d 5 h")]
)
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
