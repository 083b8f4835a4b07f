"""Ask Slurm for all runs of this process in one call, and no oftener than each of them needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from launch import lineage
from launch.job_state import JobStatus
from launch.submitted import SubmittedJob

Query = Callable[[Sequence[SubmittedJob]], Mapping[str, JobStatus]]


def _ask_slurm(jobs: Sequence[SubmittedJob]) -> Mapping[str, JobStatus]:
    from launch.monitor import job_statuses

    return job_statuses(jobs)


class JobWatch:
    """The last known state of every job somebody in this process waits for.

    A hundred runs awaited together make one squeue every half minute, not a hundred.
    """

    def __init__(self, query: Query = _ask_slurm, *, now: Callable[[], float] = time.monotonic) -> None:
        self._query = query
        self._now = now
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[SubmittedJob, JobStatus | None, float]] = {}

    def status(self, jobs: Sequence[SubmittedJob], *, max_age_s: float) -> JobStatus | None:
        """The state of a run from all its jobs (launch/lineage.py), at most `max_age_s` seconds old; None without jobs.

        Asks for all other live jobs in the same call.
        """
        return self.statuses({"": jobs}, max_age_s=max_age_s).get("")

    def statuses(self, runs: Mapping[str, Sequence[SubmittedJob]], *, max_age_s: float) -> dict[str, JobStatus]:
        """The states of several runs, by the same keys, from one call. A run without jobs is left out."""
        asked_for = [job for jobs in runs.values() for job in jobs]
        with self._lock:
            for job in asked_for:
                self._known.setdefault(_key(job), (job, None, float("-inf")))
            # The end of a run's last job is asked again: accounting knows more of it later.
            newest = {_key(jobs[-1]) for jobs in runs.values() if jobs}
            if any(self._stale(job, max_age_s, last=_key(job) in newest) for job in asked_for):
                live = [
                    job
                    for key, (job, status, _) in self._known.items()
                    if status is None or not status.state.finished or key in newest
                ]
                for executor in ("slurm", "local"):  # apart: a process id may equal a job id
                    asked = [job for job in live if job.executor == executor]
                    answer = self._query(asked) if asked else {}
                    for job in asked:
                        self._known[_key(job)] = (job, answer[job.job_id], self._now())
            found: dict[str, JobStatus] = {}
            for name, jobs in runs.items():
                known = {job.job_id: status for job in jobs if (status := self._known[_key(job)][1]) is not None}
                if (status := lineage.current(jobs, known)) is not None:
                    found[name] = status
            return found

    def _stale(self, job: SubmittedJob, max_age_s: float, *, last: bool) -> bool:
        _, status, asked_at = self._known[_key(job)]
        if status is not None and status.state.finished and not last:
            return False
        return status is None or self._now() - asked_at >= max_age_s


def _key(job: SubmittedJob) -> tuple[str, str]:
    return job.run_id, job.job_id


JOBS = JobWatch()
"""The one of this process."""
