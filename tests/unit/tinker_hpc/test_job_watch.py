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


def state(watch: JobWatch, one: SubmittedJob, max_age_s: float) -> JobState:
    status = watch.status([one], max_age_s=max_age_s)
    assert status is not None
    return status.state


def test_a_hundred_runs_make_one_question() -> None:
    slurm, now = Slurm(), [0.0]
    watch = JobWatch(slurm, now=lambda: now[0])
    jobs = [job(str(i)) for i in range(100)]
    watch.statuses({job.run_id: [job] for job in jobs}, max_age_s=30)
    now[0] = 31.0
    for each in jobs:
        assert state(watch, each, 30) is JobState.RUNNING
    assert [len(call) for call in slurm.calls] == [100, 100]


def test_an_answer_is_kept_as_long_as_asked_for() -> None:
    slurm, now = Slurm(), [0.0]
    watch = JobWatch(slurm, now=lambda: now[0])
    watch.status([job("1")], max_age_s=30)
    slurm.states["1"] = JobState.COMPLETED
    now[0] = 10.0
    assert state(watch, job("1"), 30) is JobState.RUNNING
    assert state(watch, job("1"), 5) is JobState.COMPLETED


def test_finished_jobs_of_others_are_not_asked_about_again() -> None:
    slurm, now = Slurm(), [0.0]
    watch = JobWatch(slurm, now=lambda: now[0])
    slurm.states["1"] = JobState.FAILED
    watch.statuses({"a": [job("1")], "b": [job("2")]}, max_age_s=0)
    now[0] = 100.0
    watch.status([job("2")], max_age_s=0)
    assert slurm.calls == [["1", "2"], ["2"]]


def test_a_process_id_that_equals_a_job_id() -> None:
    slurm = Slurm()
    watch = JobWatch(slurm)
    both = watch.statuses({"a": [job("7")], "b": [job("7", "local")]}, max_age_s=0)
    assert len(both) == 2 and slurm.calls == [["7"], ["7"]]


def test_a_run_is_as_its_jobs_are_together() -> None:
    slurm = Slurm()
    watch = JobWatch(slurm)
    first, second = job("1"), SubmittedJob("2", "c", 0.0, job("1").run_id, "slurm", "/nowhere")
    slurm.states = {"1": JobState.RUNNING, "2": JobState.PENDING}
    assert watch.status([first, second], max_age_s=0).state is JobState.RUNNING  # type: ignore[union-attr]
    slurm.states = {"1": JobState.PREEMPTED, "2": JobState.PENDING}
    assert watch.status([first, second], max_age_s=0).job_id == "2"  # type: ignore[union-attr]
    assert watch.status([], max_age_s=0) is None
