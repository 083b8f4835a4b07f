"""What Slurm's words mean to us (pure). The one table; squeue, sacct and scontrol all come through here.

Two rules. A word is compared by its first part only: sacct writes "CANCELLED by 2001". And a word this table does not
know is UNKNOWN: neither finished nor running. The monitor gives UNKNOWN a deadline.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class JobState(enum.Enum):
    """Where a job is in its life."""

    PENDING = "PENDING"
    """In the queue, also held, or requeued by an administrator."""
    RUNNING = "RUNNING"
    """On its nodes: starting up, running, suspended or ending."""
    COMPLETED = "COMPLETED"
    """Ended with exit code 0."""
    FAILED = "FAILED"
    """Ended with another exit code, or could not be launched."""
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    """Killed at its time limit."""
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    """Ended for a job of higher priority. With --no-requeue it is the end of this job; a run has further ones."""
    UNKNOWN = "UNKNOWN"
    """Slurm cannot be asked, does not know the job (yet, or any more), or says a word we do not know."""
    LOST = "LOST"
    """UNKNOWN for longer than the deadline although Slurm answers: the job is gone and nobody knows how it ended."""

    @property
    def finished(self) -> bool:
        """True if the job will never run again. UNKNOWN is not finished; LOST is."""
        return self not in (JobState.PENDING, JobState.RUNNING, JobState.UNKNOWN)

    @property
    def ok(self) -> bool:
        """True for the one good end."""
        return self is JobState.COMPLETED


# Slurm 22.05 `squeue --help`, `sacct` man page, "JOB STATE CODES"; later versions only added words.
_STATES: dict[str, JobState] = {
    "PENDING": JobState.PENDING,
    "CONFIGURING": JobState.RUNNING,  # allocated, nodes booting: the clock runs
    "RUNNING": JobState.RUNNING,
    "COMPLETING": JobState.RUNNING,  # processes still ending; the next word says how it ended
    "STAGE_OUT": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "SUSPENDED": JobState.RUNNING,  # comes back (submitit takes it for an end and caches that)
    "STOPPED": JobState.RUNNING,
    "COMPLETED": JobState.COMPLETED,
    "FAILED": JobState.FAILED,
    "BOOT_FAIL": JobState.NODE_FAIL,
    "LAUNCH_FAILED": JobState.FAILED,
    "NODE_FAIL": JobState.NODE_FAIL,
    "CANCELLED": JobState.CANCELLED,
    "REVOKED": JobState.CANCELLED,
    "TIMEOUT": JobState.TIMEOUT,
    "DEADLINE": JobState.TIMEOUT,  # --deadline: could not, or did not, end before it
    "OUT_OF_MEMORY": JobState.OUT_OF_MEMORY,
    "PREEMPTED": JobState.PREEMPTED,
    "REQUEUED": JobState.PENDING,  # an old record of a job that is in the queue again
    "REQUEUE_FED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "SPECIAL_EXIT": JobState.PENDING,
    "RESV_DEL_HOLD": JobState.PENDING,
}


# Why our supervisor says a run ended (`reason` in outcome.json) -> the state Slurm has, or should have, for it.
OUTCOME_STATES: dict[str, JobState] = {
    "cancelled": JobState.CANCELLED,
    "time_limit": JobState.TIMEOUT,
    "preempted": JobState.PREEMPTED,  # Slurm 22.05 says FAILED if the job ends within its grace time
    "out_of_memory": JobState.OUT_OF_MEMORY,
    "node_fail": JobState.NODE_FAIL,
}


def job_state(slurm_state: str) -> JobState:
    """Our state for Slurm's word; UNKNOWN for one we do not know ("" included)."""
    first = slurm_state.strip().rstrip("+").split(maxsplit=1)  # narrow sacct columns end in "+"
    return _STATES.get(first[0].upper(), JobState.UNKNOWN) if first else JobState.UNKNOWN


@dataclass(frozen=True)
class JobStatus:
    """Everything known about a job at one moment. None is "not known (yet)", never zero."""

    job_id: str
    state: JobState
    slurm_state: str = ""
    """Slurm's own words ("CANCELLED by 2001"); for local jobs and LOST, ours."""
    reason: str = ""
    """Why it waits or how it ended: Slurm's reason ("Priority"), or a sentence of ours."""
    exit_code: int | None = None
    """Of the batch script. From sacct it is masked to 7 bits (128 shows as 0), so 0 beside FAILED means "not 0"."""
    signal: int | None = None
    """The signal that ended it, if one did."""
    nodes: tuple[str, ...] = field(default=())
    """Names of its nodes, first node first; empty while it waits."""
    start: float | None = None
    """Unix seconds."""
    end: float | None = None
    """Unix seconds; None while it has not ended."""
    elapsed_s: float | None = None
    estimated_start: float | None = None
    """Unix seconds; the scheduler's guess while the job waits."""
    gpu_hours: float | None = None
    peak_memory_gib: float | None = None
    """Largest resident set of any of its processes' steps on one node, from accounting."""
