"""The rule that says whether a run goes on, the claims it reads, and one status out of several jobs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from launch import attempts, lineage, progress
from launch.chain import SCANCELLED, SUPERSEDED, WITHOUT_A_WORD, Attempt, explained, verdict
from launch.job_state import JobState, JobStatus
from launch.ranks_keeper import may_start_again
from launch.submitted import SubmittedJob
from tinker_hpc.log import Lease, Record, ResultLog
from tinker_hpc.run_folder import RunFolder


def attempt(reason: str, *, progress: bool = False, number: int = 1) -> Attempt:
    return Attempt(number, f"job-{number}", reason, progress)


@pytest.mark.parametrize(
    "reason", ["loop", "worker", "gateway", "setup", "out_of_memory", "closed", "cancelled", "run_gone"]
)
def test_what_ended_by_itself_is_over(reason: str) -> None:
    ruling = verdict([attempt(reason, progress=True)], cancelled=False)
    assert not ruling.goes_on and ruling.reason == reason


@pytest.mark.parametrize(
    "reason", ["preempted", "node_fail", "signal", "time_limit", SCANCELLED, SUPERSEDED, WITHOUT_A_WORD]
)
def test_what_was_ended_from_outside_goes_on(reason: str) -> None:
    many = [attempt(reason, progress=True, number=n) for n in range(1, 40)]
    assert verdict(many, cancelled=False).goes_on, "with progress each time, for ever"
    assert not verdict(many, cancelled=True).goes_on, "but not against the user's wish"


def test_not_for_ever() -> None:
    ruling = verdict([attempt("time_limit")], cancelled=False)
    assert not ruling.goes_on and ruling.reason == "time_limit" and "not one new answer" in ruling.why
    past = [attempt("preempted", progress=True), attempt("preempted", number=2), attempt("node_fail", number=3)]
    assert verdict(past, cancelled=False).goes_on, "two in vain"
    ruling = verdict([*past, attempt("preempted", number=4)], cancelled=False)
    assert not ruling.goes_on and ruling.reason == "preempted" and "last 3 jobs" in ruling.why
    assert verdict([*past, attempt("preempted", number=4, progress=True)], cancelled=False).goes_on


def test_slurm_says_what_a_killed_job_could_not() -> None:
    def reason(slurm_state: str, before: str = WITHOUT_A_WORD) -> str:
        return explained(attempt(before), slurm_state, uid=2001).reason

    assert reason("NODE_FAIL") == "node_fail" and reason("TIMEOUT") == "time_limit"
    assert reason("OUT_OF_MEMORY") == "out_of_memory" and reason("PREEMPTED") == "preempted"
    assert reason("CANCELLED by 2001") == "cancelled", "the owner's own scancel is a wish"
    assert reason("CANCELLED by 0", SCANCELLED) == SCANCELLED and reason("CANCELLED") == SCANCELLED
    assert reason("") == WITHOUT_A_WORD and reason("FAILED") == WITHOUT_A_WORD
    assert reason("CANCELLED by 2001", "preempted") == "preempted", "what was said is believed"


def test_agents_are_started_again() -> None:
    assert may_start_again(killed=True, progressed=False, num_in_vain=2)
    assert not may_start_again(killed=True, progressed=False, num_in_vain=3)
    assert not may_start_again(killed=False, progressed=False, num_in_vain=1), "its ranks failed, they will again"
    assert may_start_again(killed=False, progressed=True, num_in_vain=0)


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    folder = RunFolder.new(root, "r")
    folder.worker(0).create(base_model="m", base_model_folder="/m")
    return folder


def start_worker(folder: RunFolder) -> ResultLog:
    return ResultLog(folder.worker(0).path, Lease.acquire(folder.worker(0).lease, {}))


def test_claims_are_fences(run_folder: RunFolder) -> None:
    assert attempts.holder(run_folder) == 0 and attempts.newest_claim(run_folder) is None
    first = attempts.begin(run_folder, {"job_id": "1", "host": "node1", "pid": 1})
    second = attempts.begin(run_folder, {"job_id": "1", "host": "node2", "pid": 1})
    assert (first, second) == (1, 2), "the same job started a second time is another attempt"
    assert attempts.holder(run_folder) == 2
    assert (attempts.newest_claim(run_folder) or {})["host"] == "node2"
    for path in run_folder.attempts.iterdir():
        assert path.stat().st_mode & 0o077 == 0


class HandClock:
    """A clock that moves when one sleeps, and what else happens then."""

    def __init__(self, meanwhile: Any = None) -> None:
        self.now, self._meanwhile = 0.0, meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self._meanwhile:
            self._meanwhile(self.now)


def test_the_next_job_waits_for_the_old_heart(run_folder: RunFolder) -> None:
    number = attempts.begin(run_folder, {"job_id": "1", "host": "another", "pid": 1})
    waits = {}

    def lives_on_for_a_while(now: float) -> None:
        if now < 10:
            attempts.beat(run_folder, number)

    for what, meanwhile in (("silent", None), ("alive", lives_on_for_a_while)):
        clock = HandClock(meanwhile)
        waits[what] = attempts.wait_until_gone(run_folder, number, now=clock, sleep=clock.sleep)
    assert attempts.DEAD_AFTER_S <= waits["silent"] < attempts.DEAD_AFTER_S + 1
    assert 10 + attempts.DEAD_AFTER_S - 1 < waits["alive"] < 11 + attempts.DEAD_AFTER_S
    attempts.end(run_folder, number, reason="preempted", error=None, exit_code=143, progressed=False)
    assert attempts.wait_until_gone(run_folder, number, sleep=lambda _: None) < 1


def test_nobody_waits_for_a_process_of_this_host_that_is_gone(run_folder: RunFolder) -> None:
    number = attempts.begin(run_folder, {"job_id": "1", "host": os.uname().nodename, "pid": os.getpid()})
    path = run_folder.attempts / f"claim-{number:06d}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "process_start": 1}))
    began = time.monotonic()
    attempts.wait_until_gone(run_folder, number)
    assert time.monotonic() - began < attempts.DEAD_AFTER_S / 2


def test_progress_is_seen_without_a_word_of_the_dead(run_folder: RunFolder) -> None:
    def history() -> list[tuple[str, bool]]:
        return [(a.reason, a.progress) for a in attempts.history(run_folder, credit="answers")]

    who = {"job_id": "1", "host": "node1", "pid": 1}
    attempts.begin(run_folder, who)
    assert not attempts.takes_requests(run_folder)
    start_worker(run_folder).publish([Record({"op": "worker_started"})])
    assert attempts.takes_requests(run_folder) and history() == [(WITHOUT_A_WORD, False)]
    attempts.begin(run_folder, who)
    assert not attempts.takes_requests(run_folder), "the worker of the job before is not this one's"
    log = start_worker(run_folder)
    log.publish([Record({"op": "forward_backward", "ok": False})])
    assert history() == [(WITHOUT_A_WORD, False)] * 2, "a refusal is no progress"
    log.publish([Record({"op": "forward_backward", "ok": True})])
    attempts.begin(run_folder, who)
    assert history() == [(WITHOUT_A_WORD, False), (WITHOUT_A_WORD, True), (WITHOUT_A_WORD, False)]
    assert progress.made(run_folder, {}, {}, credit="answers")
    attempts.start_afresh(run_folder)
    assert history() == [], "resumed by the user: the count begins anew"


def job(job_id: str) -> SubmittedJob:
    return SubmittedJob(job_id, "della", 0.0, "r-1", "slurm", "/data/runs/r-1")


def test_the_jobs_of_a_run_in_order(run_folder: RunFolder) -> None:
    assert lineage.jobs_of(run_folder) == []
    run_folder.submitted.write_text(json.dumps(job("10").to_json()))
    for number in range(11, 23):
        lineage.remember(run_folder, job(str(number)))
    assert [each.job_id for each in lineage.jobs_of(run_folder)] == [str(n) for n in range(10, 23)]


def test_one_status_of_several_jobs() -> None:
    jobs = [job("1"), job("2"), job("3")]
    ended = JobStatus("1", JobState.PREEMPTED, start=1.0, end=11.0, elapsed_s=10.0, gpu_hours=1.0)
    runs = JobStatus("2", JobState.RUNNING, start=20.0, elapsed_s=5.0)
    waits = JobStatus("3", JobState.PENDING, reason="Dependency")
    status = lineage.current(jobs, {"1": ended, "2": runs, "3": waits})
    assert status is not None and (status.job_id, status.start, status.elapsed_s) == ("2", 1.0, 15.0)
    assert lineage.current(jobs, {"1": ended, "3": waits}).state is JobState.PENDING  # type: ignore[union-attr]
    never = JobStatus("3", JobState.CANCELLED)
    done = JobStatus("2", JobState.COMPLETED, start=20.0, elapsed_s=9.0)
    assert lineage.current(jobs, {"1": ended, "2": done, "3": never}).job_id == "2"  # type: ignore[union-attr]
    assert lineage.current(jobs, {}) is None
