"""A job that ended before its work did -> the error its future raises (pure).

The message says what ended, how, where, after how long, during what, where the log is and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.job_spec import JobSpec
from launch.job_state import OUTCOME_STATES, JobState, JobStatus
from tinker_hpc.errors import (
    JobCancelledError,
    JobFailedError,
    JobNeverStartedError,
    JobNodeFailError,
    JobOutOfMemoryError,
    JobTimeLimitError,
)

_CLASSES: dict[JobState, type[JobFailedError]] = {
    JobState.CANCELLED: JobCancelledError,
    JobState.TIMEOUT: JobTimeLimitError,
    JobState.OUT_OF_MEMORY: JobOutOfMemoryError,
    JobState.NODE_FAIL: JobNodeFailError,
}


def error_for(
    status: JobStatus,
    spec: JobSpec,
    log_paths: Sequence[str],
    *,
    outcome: dict[str, Any] | None = None,
    doing: str | None = None,
) -> JobFailedError:
    """The error for a job that ended, in Slurm's view or its supervisor's.

    Args:
        log_paths: where to look, the most telling one first.
        outcome: `outcome.json`, if the supervisor wrote one.
        doing: what it was doing, e.g. "request 118 (optim_step); last step 1400".
    Returns: an instance of the right subclass, with `reason` (our state's name), `job_id`, `run_id`, `log_paths`.
    """
    outcome = outcome or {}
    state = status.state
    if state in (JobState.FAILED, JobState.RUNNING, JobState.UNKNOWN, JobState.COMPLETED):
        # Slurm has no word yet, or none that says more than our supervisor's.
        state = OUTCOME_STATES.get(str(outcome.get("reason")), state)
    if state is JobState.COMPLETED and outcome.get("state") == "failed":
        state = JobState.FAILED  # the last job of the run found that it should not go on, and ended well
    never_started = state.finished and status.start is None and not outcome and state is not JobState.LOST
    if spec.cluster.executor == "local":
        never_started = False  # it has no queue; without a start it fell over at once
    # Somebody's wish is the better reason: a job cancelled while it waited was cancelled.
    kind = (
        JobNeverStartedError
        if never_started and state is not JobState.CANCELLED
        else _CLASSES.get(state, JobFailedError)
    )
    sentences = [_what_ended(status, state, spec, doing, never_started=never_started)]
    why = str(outcome.get("error") or "") or status.reason
    if why and why not in sentences[0]:
        sentences.append(f"Reason: {why.rstrip('.')}.")
    if log_paths and not never_started:
        sentences.append(f"Log: {log_paths[0]}.")
    sentences.append(next_step(state, spec, status, never_started=never_started))
    return kind(
        " ".join(sentences),
        reason=state.value,
        slurm_state=status.slurm_state,
        job_id=status.job_id,
        run_id=spec.run_id,
        log_paths=tuple(log_paths),
    )


def _what_ended(status: JobStatus, state: JobState, spec: JobSpec, doing: str | None, *, never_started: bool) -> str:
    job = f"local job {status.job_id}" if spec.cluster.executor == "local" else f"job {status.job_id}"
    # Slurm's own words where they say more ("CANCELLED by 2001"); ours where we know better ("FAILED" after an OOM).
    words = status.slurm_state if status.slurm_state.startswith(state.value) else state.value
    parts = [f"{job} (run {spec.run_id}) ended {words}"]
    if never_started:
        parts.append("without ever starting")
    if status.nodes:
        parts.append(f"on {status.nodes[0] if len(status.nodes) == 1 else ', '.join(status.nodes)}")
    if status.elapsed_s is not None and not never_started:
        parts.append(f"after {duration_text(status.elapsed_s)}")
    if status.exit_code:
        parts.append(f"with exit code {status.exit_code}")
    if doing:
        parts.append(f"during {doing}")
    return " ".join(parts) + "."


def next_step(state: JobState, spec: JobSpec, status: JobStatus, *, never_started: bool = False) -> str:
    """What the user can do about it (pure)."""
    if state is JobState.TIMEOUT:
        return f"It asked for {spec.time_limit_min} min: ask for more with `time`, or for fewer steps per run."
    if state is JobState.OUT_OF_MEMORY:
        asked = spec.memory_per_node or "the cluster's default"
        used = f" and used {status.peak_memory_gib:.1f} GiB" if status.peak_memory_gib else ""
        return f"It asked for {asked} of memory per node{used}: ask for more with `memory`, or use more ranks."
    if state is JobState.CANCELLED:
        return "Submit it again if that was not intended."
    if state is JobState.NODE_FAIL:
        return "The node went down, not your program: submit it again, with `extra` in the profile to exclude the node."
    if state is JobState.PREEMPTED:
        return "A job of higher priority took its nodes: submit it again, or use another `qos` or `partition`."
    if state is JobState.LOST:
        return (
            f"Nobody knows how it ended (`sacct -D -j {status.job_id}` may, later). The logs in its run folder are "
            "all there is; submit it again."
        )
    if never_started:
        return "It was never launched: `scontrol show job` while it waits, or your cluster's help desk, knows why."
    return f"`tinker-hpc logs {spec.run_id}` shows the log."


def duration_text(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `3 h 12 min`, `2 d 5 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
