"""Ask Slurm for all runs of this process in one call, and no oftener than each of them needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

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
        self._known: dict[str, tuple[SubmittedJob, JobStatus | None, float]] = {}

    def status(self, job: SubmittedJob, *, max_age_s: float) -> JobStatus:
        """The job's state, at most `max_age_s` seconds old. Asks for all other live jobs in the same call."""
        return self.statuses([job], max_age_s=max_age_s)[job.run_id]

    def statuses(self, jobs: Sequence[SubmittedJob], *, max_age_s: float) -> dict[str, JobStatus]:
        """The states of several jobs by run id, from one call."""
        with self._lock:
            for job in jobs:
                self._known.setdefault(job.run_id, (job, None, float("-inf")))
            if any(self._stale(job.run_id, max_age_s) for job in jobs):
                live = [
                    job
                    for job, status, _ in self._known.values()
                    if status is None or not status.state.finished or job in jobs
                ]
                for executor in ("slurm", "local"):  # apart: a process id may equal a job id
                    asked = [job for job in live if job.executor == executor]
                    answer = self._query(asked) if asked else {}
                    for job in asked:
                        self._known[job.run_id] = (job, answer[job.job_id], self._now())
            found = {job.run_id: self._known[job.run_id][1] for job in jobs}
            return {run_id: status for run_id, status in found.items() if status is not None}

    def _stale(self, run_id: str, max_age_s: float) -> bool:
        _, status, asked_at = self._known[run_id]
        return status is None or self._now() - asked_at >= max_age_s


JOBS = JobWatch()
"""The one of this process."""
