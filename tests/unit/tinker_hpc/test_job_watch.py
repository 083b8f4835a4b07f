"""Many waiting runs, one question to Slurm."""

from __future__ import annotations

from collections.abc import Sequence

from launch.job_state import JobState, JobStatus
from launch.submitted import SubmittedJob
from tinker_hpc.job_watch import JobWatch


class Slurm:
    """Answers from a table and counts the questions."""

    def __init__(self) -> None:
        self.states: dict[str, JobState] = {}
        self.calls: list[list[str]] = []

    def __call__(self, jobs: Sequence[SubmittedJob]) -> dict[str, JobStatus]:
        self.calls.append(sorted(job.job_id for job in jobs))
        return {job.job_id: JobStatus(job.job_id, self.states.get(job.job_id, JobState.RUNNING)) for job in jobs}


def job(job_id: str, executor: str = "slurm") -> SubmittedJob:
    return SubmittedJob(job_id, "c", 0.0, f"run-{executor}-{job_id}", executor, "/nowhere")  # type: ignore[arg-type]


def test_a_hundred_runs_make_one_question() -> None:
    slurm, now = Slurm(), [0.0]
    watch = JobWatch(slurm, now=lambda: now[0])
    jobs = [job(str(i)) for i in range(100)]
    watch.statuses(jobs, max_age_s=30)
    now[0] = 31.0
    for each in jobs:
        assert watch.status(each, max_age_s=30).state is JobState.RUNNING
    assert [len(call) for call in slurm.calls] == [100, 100]


def test_an_answer_is_kept_as_long_as_asked_for() -> None:
    slurm, now = Slurm(), [0.0]
    watch = JobWatch(slurm, now=lambda: now[0])
    watch.status(job("1"), max_age_s=30)
    slurm.states["1"] = JobState.COMPLETED
    now[0] = 10.0
    assert watch.status(job("1"), max_age_s=30).state is JobState.RUNNING
    assert watch.status(job("1"), max_age_s=5).state is JobState.COMPLETED


def test_finished_jobs_of_others_are_not_asked_about_again() -> None:
    slurm, now = Slurm(), [0.0]
    watch = JobWatch(slurm, now=lambda: now[0])
    slurm.states["1"] = JobState.FAILED
    watch.statuses([job("1"), job("2")], max_age_s=0)
    now[0] = 100.0
    watch.status(job("2"), max_age_s=0)
    assert slurm.calls == [["1", "2"], ["2"]]


def test_a_process_id_that_equals_a_job_id() -> None:
    slurm = Slurm()
    watch = JobWatch(slurm)
    both = watch.statuses([job("7"), job("7", "local")], max_age_s=0)
    assert len(both) == 2 and slurm.calls == [["7"], ["7"]]
