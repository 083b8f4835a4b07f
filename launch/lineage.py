"""The jobs of a run, one after another: which there are, and one status out of all of theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from launch.job_state import JobState, JobStatus
from launch.submitted import SubmittedJob
from tinker_hpc.private_files import make_private, write_json
from tinker_hpc.run_folder import RunFolder


def jobs_of(run_folder: RunFolder) -> list[SubmittedJob]:
    """Every job that was submitted for a run, in that order; [] if none (completely) was.

    submitted.json is the first; jobs/<n>.json are those that followed. Lists the folder afresh.
    Raises: DataRootError naming a file that is damaged.
    """
    first = SubmittedJob.of(run_folder)
    if first is None:
        return []
    jobs = [first]
    for number in _numbers(run_folder):
        job = SubmittedJob.read(run_folder.jobs / f"{number}.json", run_folder)
        if job is not None:
            jobs.append(job)
    return jobs


def remember(run_folder: RunFolder, job: SubmittedJob) -> None:
    """Add a job to the run's list. The number is reserved before it is written: two submitters never share one."""
    make_private(run_folder.jobs)
    while True:
        number = max(_numbers(run_folder), default=1) + 1
        path = run_folder.jobs / f"{number}.json"
        try:
            os.close(os.open(path.with_suffix(".taken"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            continue
        write_json(path, job.to_json())
        return


def _numbers(run_folder: RunFolder) -> list[int]:
    try:
        names = os.listdir(run_folder.jobs)
    except FileNotFoundError:
        return []
    return sorted({int(name.split(".")[0]) for name in names if name.split(".")[0].isdigit()})


def current(jobs: Sequence[SubmittedJob], statuses: Mapping[str, JobStatus]) -> JobStatus | None:
    """The status of a run's chain of jobs, from the status of each by job id (pure).

    The one that runs; else the one that waits, which is why the run waits; else one nobody can tell about; else the
    last that did any work. Hours and elapsed time are those of all of them.
    """
    known = [statuses[job.job_id] for job in jobs if job.job_id in statuses]
    if not known:
        return None
    chosen = None
    for state in (JobState.RUNNING, JobState.PENDING, JobState.UNKNOWN):
        chosen = chosen or next((status for status in known if status.state is state), None)
    if chosen is None:
        started = [status for status in known if status.start is not None]
        chosen = (started or known)[-1]
    if len(known) == 1:
        return chosen
    hours = [status.gpu_hours for status in known if status.gpu_hours is not None]
    peaks = [status.peak_memory_gib for status in known if status.peak_memory_gib is not None]
    starts = [status.start for status in known if status.start is not None]
    spent = [status.elapsed_s for status in known if status.elapsed_s is not None]
    return replace(
        chosen,
        gpu_hours=sum(hours) if hours else None,
        peak_memory_gib=max(peaks) if peaks else None,
        start=min(starts) if starts else None,
        elapsed_s=sum(spent) if spent else None,
    )
