"""When is a run over: real run folders, a clock that is turned by hand, and Slurm's answers from a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch.job_state import JobState, JobStatus
from launch.submitted import SubmittedJob
from tinker_hpc.private_files import write_bytes, write_json
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.waiting import Ended, Patience, Waiter

FUNCTION = {"kind": "run", "command": None}
COMMAND = {"kind": "run", "command": ["python", "x.py"]}
SESSION = {"kind": "session", "command": None}


@dataclass
class World:
    """A run folder, a clock, and what Slurm would say at which time."""

    folder: RunFolder
    job: Callable[[float], JobStatus | None]
    happens: dict[float, Callable[[RunFolder], None]] = field(default_factory=dict)
    now: float = 0.0
    asked_at: list[float] = field(default_factory=list)

    def ask(self, max_age_s: float) -> JobStatus | None:
        self.asked_at.append(self.now)
        return self.job(self.now)

    def wait(self, patience: Patience, *, at_most: float = 1000.0) -> tuple[Ended, float]:
        waiter = Waiter(self.folder, ask=self.ask, patience=patience, now=lambda: self.now)
        while True:
            step = waiter.step()
            if isinstance(step, Ended):
                return step, self.now
            assert 0 < step <= patience.longest_ask_s
            self.now += step
            for moment in [m for m in self.happens if m <= self.now]:
                self.happens.pop(moment)(self.folder)
            assert self.now < at_most, "the future hangs"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    def make_world(spec: dict, job: Callable[[float], JobStatus | None], **happens) -> World:
        folder = RunFolder.new(tmp_path / "root", "w")
        write_json(folder.spec, spec)
        first = SubmittedJob("7", "della", 0.0, folder.run_id, "slurm", str(folder.path))
        write_json(folder.submitted, first.to_json())
        return World(folder, job, {float(k[1:]): v for k, v in happens.items()})

    return make_world


def job(state: JobState, *, started: bool = True) -> JobStatus:
    return JobStatus("7", state, state.value, start=1.0 if started else None)


def always(state: JobState, *, started: bool = True) -> Callable[[float], JobStatus]:
    return lambda now: job(state, started=started)


def writes_result(folder: RunFolder) -> None:
    write_bytes(folder.result, b"...")


def writes_outcome(state: str, reason: str = "loop", exit_code: int = 0) -> Callable[[RunFolder], None]:
    return lambda folder: write_json(
        folder.outcome, {"state": state, "reason": reason, "exit_code": exit_code, "error": "why"}
    )


SLURM = Patience()


def test_own_files_end_the_wait_without_a_word_from_slurm(make) -> None:
    world = make(FUNCTION, always(JobState.UNKNOWN), t2=writes_result)
    ended, at = world.wait(SLURM)
    assert ended.own.has_result and at < 6 and len(world.asked_at) <= 1


def test_a_result_that_was_there_before_is_found_at_once(make) -> None:
    world = make(FUNCTION, always(JobState.UNKNOWN))
    writes_result(world.folder)
    assert world.wait(SLURM)[1] == 0.0
    assert world.asked_at == []


@pytest.mark.parametrize("state", [s for s in JobState if s.finished and s is not JobState.COMPLETED])
@pytest.mark.parametrize("spec", [FUNCTION, COMMAND, SESSION])
def test_every_way_a_job_ends_ends_the_wait(make, state: JobState, spec: dict) -> None:
    world = make(spec, lambda now: job(JobState.RUNNING) if now < 100 else job(state))
    ended, at = world.wait(SLURM)
    assert ended.job is not None and ended.job.state is state
    assert at <= 100 + SLURM.longest_ask_s + SLURM.visible_after_killed_s + SLURM.longest_look_s


def test_a_job_that_never_started_is_not_waited_for(make) -> None:
    world = make(FUNCTION, lambda now: job(JobState.CANCELLED if now > 50 else JobState.PENDING, started=False))
    ended, at = world.wait(SLURM)
    assert ended.job is not None and ended.job.state is JobState.CANCELLED
    assert at <= 50 + SLURM.longest_ask_s + SLURM.longest_look_s


def test_a_result_that_a_filesystem_shows_late_still_counts(make) -> None:
    """The job is over, its result invisible here for half a minute: NFS."""
    world = make(FUNCTION, always(JobState.COMPLETED), t45=writes_result)
    ended, at = world.wait(SLURM)
    assert ended.own.has_result
    assert 44 <= at <= 47


def test_a_completed_job_without_a_result_is_given_up_after_a_minute(make) -> None:
    ended, at = make(FUNCTION, always(JobState.COMPLETED)).wait(SLURM)
    assert not ended.own.has_result
    assert SLURM.visible_after_completed_s <= at <= SLURM.visible_after_completed_s + 10


def test_slurm_is_asked_rarely_and_more_rarely(make) -> None:
    world = make(FUNCTION, always(JobState.RUNNING), t3600=writes_result)
    world.wait(SLURM, at_most=4000)
    gaps = [round(b - a, 6) for a, b in zip(world.asked_at, world.asked_at[1:], strict=False)]
    assert gaps == sorted(gaps) and min(gaps) >= SLURM.first_ask_s
    assert len(world.asked_at) <= 3600 / SLURM.longest_ask_s + 8


@pytest.mark.parametrize(
    ("spec", "outcome", "needs_slurm"),
    [
        (COMMAND, writes_outcome("succeeded"), False),
        (SESSION, writes_outcome("succeeded", "closed"), False),
        (COMMAND, writes_outcome("failed", "loop", 3), False),
        (FUNCTION, writes_outcome("failed", "setup", 1), False),
        (FUNCTION, writes_outcome("failed", "gateway", 1), False),
        (SESSION, writes_outcome("failed", "worker", 1), False),
        (COMMAND, writes_outcome("failed", "loop", 137), True),  # killed by 9: memory?
        (FUNCTION, writes_outcome("failed", "loop", 1), True),  # no result.pkl: it died before it could write
        (COMMAND, writes_outcome("failed", "signal", 143), True),  # the time limit? a hand?
    ],
)
def test_when_the_supervisors_word_is_enough(make, spec, outcome, needs_slurm) -> None:
    world = make(spec, lambda now: job(JobState.FAILED if now > 8 else JobState.RUNNING), t1=outcome)
    ended, _ = world.wait(SLURM)
    assert (ended.job is not None) is needs_slurm
    assert bool(world.asked_at) is needs_slurm


def test_a_job_that_never_ends_after_its_loop_does_not_hold_the_future(make) -> None:
    world = make(FUNCTION, always(JobState.RUNNING), t1=writes_outcome("failed", "loop", 139))
    _, at = world.wait(SLURM)
    assert at <= SLURM.job_after_loop_s + 10


def test_a_run_without_a_job_is_given_up(make) -> None:
    world = make(FUNCTION, lambda now: None)
    ended, at = world.wait(SLURM)
    assert ended.job is None and at <= SLURM.unsubmitted_s + SLURM.first_ask_s + 5
