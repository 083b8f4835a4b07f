"""States from several sources, without a Slurm: a host that answers from a table, a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from launch import squeue
from launch.host import CommandResult
from launch.job_state import JobState, JobStatus
from launch.monitor import UNKNOWN_DEADLINE_S, Monitor, merge_end
from launch.submitted import SubmittedJob
from tinker_hpc.errors import SlurmUnavailableError

RECORDED = Path(__file__).parents[2] / "golden" / "slurm-22.05"


@dataclass
class TableHost:
    """Answers by the command's name; counts the calls. An exception in the table is raised."""

    answers: dict[str, object]
    calls: list[str] = field(default_factory=list)

    def run(self, argv: Sequence[str], *, timeout_s: float = 60.0) -> CommandResult:
        self.calls.append(argv[0])
        answer = self.answers[argv[0]]
        if isinstance(answer, Exception):
            raise answer
        code, out, err = answer if isinstance(answer, tuple) else (0, answer, "")
        return CommandResult(tuple(argv), code, str(out), str(err))


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def job(job_id: str, name: str) -> SubmittedJob:
    return SubmittedJob(job_id, "della", 1_795_471_232.0, name, "slurm", f"/data/runs/{name}")


def recorded_host(**changes: object) -> TableHost:
    texts = {name: (RECORDED / f"{name}.txt").read_text() for name in ("squeue", "sacct")}
    return TableHost({**texts, "scontrol": (1, "", "slurm_load_jobs error: Invalid job id specified"), **changes})


def test_one_squeue_for_all_and_one_sacct_for_the_finished() -> None:
    host = recorded_host()
    jobs = [job("3", "two-nodes"), job("4", "exit-3"), job("7", "begin-later"), job("10", "step-oom")]
    statuses = Monitor(host).job_statuses(jobs)
    assert host.calls == ["squeue", "sacct"]
    assert {job_id: status.state for job_id, status in statuses.items()} == {
        "3": JobState.COMPLETED,
        "4": JobState.FAILED,
        "7": JobState.PENDING,
        "10": JobState.OUT_OF_MEMORY,
    }
    assert statuses["4"].exit_code == 3 and statuses["3"].gpu_hours is not None


def test_accounting_is_not_asked_while_all_jobs_are_open() -> None:
    host = recorded_host()
    statuses = Monitor(host).job_statuses([job("7", "begin-later")])
    assert (host.calls, statuses["7"].reason) == (["squeue"], "BeginTime")


def test_a_job_that_left_the_queue_is_found_in_accounting() -> None:
    statuses = Monitor(recorded_host(squeue="")).job_statuses([job("2", "limit"), job("6", "cancelled")])
    assert statuses["2"].state is JobState.TIMEOUT and statuses["6"].slurm_state == "CANCELLED by 2001"


def test_an_id_given_to_another_job_is_not_ours() -> None:
    clock = Clock()
    monitor = Monitor(recorded_host(), now=clock)
    ours = job("3", "another-name")
    assert monitor.job_statuses([ours])["3"].state is JobState.UNKNOWN


def test_unknown_has_a_deadline() -> None:
    clock = Clock()
    monitor = Monitor(recorded_host(squeue="", sacct=""), now=clock)
    ours = job("99", "gone")
    assert monitor.job_statuses([ours])["99"].state is JobState.UNKNOWN
    clock.now += UNKNOWN_DEADLINE_S - 1
    assert monitor.job_statuses([ours])["99"].state is JobState.UNKNOWN
    clock.now += 2
    lost = monitor.job_statuses([ours])["99"]
    assert lost.state is JobState.LOST and "forgot" in lost.reason


def test_an_outage_is_not_a_lost_job() -> None:
    clock = Clock()
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    host = recorded_host(squeue=(1, "", words))
    monitor = Monitor(host, now=clock)
    for _ in range(20):
        status = monitor.job_statuses([job("3", "two-nodes")])["3"]
        assert status.state is JobState.UNKNOWN and "Unable to contact" in status.reason
        clock.now += 60
    host.answers["squeue"] = (RECORDED / "squeue.txt").read_text()
    clock.now += 60
    assert monitor.job_statuses([job("3", "two-nodes")])["3"].state is JobState.COMPLETED


def test_an_outage_is_not_made_worse() -> None:
    clock = Clock()
    host = TableHost({"squeue": SlurmUnavailableError("no answer")})
    monitor = Monitor(host, now=clock)
    for _ in range(600):
        monitor.job_statuses([job("3", "two-nodes")])
        clock.now += 1.0
    assert len(host.calls) < 16, "ten minutes of outage, asked every second: 2, 4, 8, ... 60 s apart"


def test_accounting_switched_off_is_found_out_once() -> None:
    scontrol_lines = (RECORDED / "scontrol.txt").read_text().splitlines()
    host = recorded_host(sacct=(1, "", "Slurm accounting storage is disabled"), scontrol=scontrol_lines[2])
    monitor = Monitor(host)
    first = monitor.job_statuses([job("5", "exit-143")])["5"]
    monitor.job_statuses([job("5", "exit-143")])
    assert (first.state, first.exit_code) == (JobState.FAILED, 143)
    assert host.calls == ["squeue", "sacct", "scontrol", "squeue", "scontrol"]


def test_a_database_that_is_down_leaves_what_squeue_knows() -> None:
    host = recorded_host(sacct=(1, "", "sacct: error: Problem talking to the database: Connection refused"))
    statuses = Monitor(host).job_statuses([job("4", "exit-3"), job("99", "gone")])
    assert statuses["4"].state is JobState.FAILED
    assert statuses["99"].state is JobState.UNKNOWN and "Connection refused" in statuses["99"].reason


def test_a_record_never_closed_is_worth_nothing() -> None:
    runaway = JobStatus("3", JobState.RUNNING, "RUNNING")
    assert merge_end(None, runaway) is None


def test_the_queue_wins_over_a_record_of_the_time_before() -> None:
    queued = JobStatus("3", JobState.FAILED, "FAILED", reason="NonZeroExitCode")
    assert merge_end(queued, JobStatus("3", JobState.COMPLETED, "COMPLETED")) == queued
    recorded = JobStatus("3", JobState.FAILED, "FAILED", exit_code=3)
    assert merge_end(queued, recorded) == replace(recorded, reason="NonZeroExitCode")


def test_the_query_is_the_recorded_one() -> None:
    host = recorded_host()
    assert len(squeue.query(host)) == 11
    with pytest.raises(SlurmUnavailableError, match="Unable to contact"):
        squeue.query(recorded_host(squeue=(1, "", "Unable to contact slurm controller")))
