"""States of submitted jobs: one `squeue` for all, accounting for those it no longer lists, the controller where there
is no accounting, the process table for local jobs.

What is not known is said to be not known. A job that Slurm, while answering, does not know for longer than a deadline
is LOST: never "completed", never "still running" for ever. How often to ask is the caller's choice (Slurm's manuals:
not from a loop; every half minute is what sites tolerate); after a failure this module itself waits before it asks
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launch import local_jobs, sacct, scontrol, squeue
from launch.host import Host, LocalHost
from launch.job_state import JobState, JobStatus
from launch.submitted import SubmittedJob
from tinker_hpc.errors import SlurmUnavailableError

UNKNOWN_DEADLINE_S = 120.0
"""How long Slurm may answer without knowing a job. Accounting lags by seconds, a restarted slurmdbd by half a minute
in which it answers with nothing."""
_FIRST_BACKOFF_S = 2.0
_LONGEST_BACKOFF_S = 60.0


@dataclass
class _Outage:
    """Slurm did not answer: what it said, and when to ask again."""

    words: str
    retry_at: float
    backoff_s: float


class Monitor:
    """Remembers between calls what only time can tell: outages, a missing accounting, how long a job is unknown.

    Args:
        host: where Slurm's commands work.
        now: a monotonic clock in seconds; tests bring their own.
    """

    def __init__(self, host: Host | None = None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._host: Host = host or LocalHost()
        self._now = now
        self._outage: _Outage | None = None
        self._has_accounting = True
        self._unknown_since: dict[tuple[str, str], float] = {}

    def job_statuses(self, jobs: Sequence[SubmittedJob]) -> dict[str, JobStatus]:
        """The state of every job, by job id. Never raises for an outage: those jobs are UNKNOWN, with Slurm's words."""
        statuses = {job.job_id: local_jobs.status(job) for job in jobs if job.executor == "local"}
        on_slurm = [job for job in jobs if job.executor == "slurm"]
        if on_slurm:
            statuses.update(self._ask_slurm(on_slurm))
        return statuses

    def _ask_slurm(self, jobs: Sequence[SubmittedJob]) -> dict[str, JobStatus]:
        if self._outage is not None and self._now() < self._outage.retry_at:
            return {job.job_id: unreachable(job, self._outage.words) for job in jobs}
        try:
            rows = squeue.query(self._host)
        except SlurmUnavailableError as error:
            self._note_outage(str(error))
            return {job.job_id: unreachable(job, str(error)) for job in jobs}
        self._outage = None
        found = {job.job_id: match_queue(job, rows) for job in jobs}
        # A job still in the queue is as squeue says; for its end, squeue lacks exit code, GPU-hours and memory.
        open_jobs = [job for job in jobs if (known := found[job.job_id]) is None or known.state.finished]
        if open_jobs:
            found.update(self._ends(open_jobs, found))
        return {job.job_id: self._with_deadline(job, found[job.job_id]) for job in jobs}

    def _ends(self, jobs: Sequence[SubmittedJob], queued: dict[str, JobStatus | None]) -> dict[str, JobStatus | None]:
        """Statuses of finished or vanished jobs, as complete as this cluster can give them."""
        trouble = ""
        rows: list[sacct.AccountingRow] = []
        if self._has_accounting:
            try:
                answer = sacct.query(
                    self._host,
                    [job.job_id for job in jobs],
                    submitted_since=min(job.submitted_at for job in jobs),
                )
                self._has_accounting = answer is not None
                rows = answer or []
            except SlurmUnavailableError as error:
                trouble = str(error)
        ends: dict[str, JobStatus | None] = {}
        for job in jobs:
            known = queued[job.job_id]
            end = match_accounting(job, rows)
            if (end is None or not end.state.finished) and not self._has_accounting:
                end = self._from_controller(job)
            ends[job.job_id] = merge_end(known, end)
            if ends[job.job_id] is None and trouble:
                ends[job.job_id] = unreachable(job, trouble)
        return ends

    def _from_controller(self, job: SubmittedJob) -> JobStatus | None:
        try:
            answer = scontrol.query(self._host, job.job_id)
        except SlurmUnavailableError:
            return None
        return answer[1] if answer is not None and answer[0] == job.run_id else None

    def _with_deadline(self, job: SubmittedJob, status: JobStatus | None) -> JobStatus:
        """UNKNOWN for a job nobody knows, LOST once that has lasted."""
        key = (job.job_id, job.run_id)
        if status is not None:
            self._unknown_since.pop(key, None)
            return status
        unknown_s = self._now() - self._unknown_since.setdefault(key, self._now())
        where = "neither the queue nor accounting" if self._has_accounting else "the queue (there is no accounting)"
        if unknown_s < UNKNOWN_DEADLINE_S:
            return JobStatus(job.job_id, JobState.UNKNOWN, reason=f"{where} lists job {job.job_id}")
        return JobStatus(
            job.job_id,
            JobState.LOST,
            reason=f"{where} has listed job {job.job_id} for {unknown_s:.0f} s: it ended, and Slurm forgot how",
        )

    def _note_outage(self, words: str) -> None:
        backoff_s = min(_LONGEST_BACKOFF_S, self._outage.backoff_s * 2 if self._outage else _FIRST_BACKOFF_S)
        self._outage = _Outage(words, self._now() + backoff_s, backoff_s)


def unreachable(job: SubmittedJob, words: str) -> JobStatus:
    """The status while Slurm does not answer; the job itself may be perfectly well."""
    return JobStatus(job.job_id, JobState.UNKNOWN, reason=words)


def match_queue(job: SubmittedJob, rows: Sequence[squeue.QueueRow]) -> JobStatus | None:
    """The queue's row for a job. The name must match too: after a crash Slurm gives out ids again (pure)."""
    return next((row.status for row in rows if row.job_id == job.job_id and row.name == job.run_id), None)


def match_accounting(job: SubmittedJob, rows: Sequence[sacct.AccountingRow]) -> JobStatus | None:
    """Accounting's newest record of a job, by id and name (pure)."""
    mine = [row for row in rows if row.job_id == job.job_id and row.name == job.run_id]
    return mine[-1].status if mine else None


def merge_end(queued: JobStatus | None, recorded: JobStatus | None) -> JobStatus | None:
    """One status from the queue's and accounting's (pure).

    Args:
        queued: what squeue says: a finished state, or None if it does not list the job.
        recorded: what accounting (or the controller) says, or None.
    Returns: None if nobody knows. Accounting that says RUNNING of a job the queue does not have is a record that was
        never closed (Slurm calls it a runaway job), and worth nothing.
    """
    if recorded is None or not recorded.state.finished:
        return queued
    if queued is None:
        return recorded
    if queued.state is not recorded.state and recorded.state is not JobState.OUT_OF_MEMORY:
        # Accounting lags behind the controller; its record may be of the time before the last change.
        return queued
    return replace(recorded, reason=queued.reason or recorded.reason)


_MONITOR: Monitor | None = None


def job_statuses(jobs: Sequence[SubmittedJob]) -> dict[str, JobStatus]:
    """`Monitor.job_statuses` of this process's one monitor, on this machine."""
    global _MONITOR  # noqa: PLW0603  one per process: it remembers outages and deadlines
    _MONITOR = _MONITOR or Monitor()
    return _MONITOR.job_statuses(jobs)
