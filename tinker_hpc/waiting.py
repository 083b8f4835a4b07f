"""When is a run over? One step at a time, so that `result()` can sleep and `await run` can yield between steps.

A run is over when its own files say so; failing that, when Slurm says the job will never run again and the files have
had time to arrive: on NFS a file written on a node may stay invisible here for a minute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from launch.job_state import JobState, JobStatus
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.run_state import OwnFiles, read_own_files

_LOG = logging.getLogger(__name__)
# An exit code from here on is a signal's (128 + its number, as shells say it) or was masked by one.
_SIGNALLED = 128


@dataclass(frozen=True)
class Patience:
    """How often is looked and how long is waited, in seconds."""

    first_look_s: float = 0.05
    longest_look_s: float = 3.0
    """Between looks at our own files: one directory listing."""
    first_ask_s: float = 4.0
    longest_ask_s: float = 30.0
    """Between questions to Slurm: its manual asks not to poll; 30 s is what sites tolerate."""
    visible_after_completed_s: float = 60.0
    """A job that ended well wrote a result: an NFS client may take this long to see it (acdirmax)."""
    visible_after_killed_s: float = 10.0
    """A killed job most likely wrote none."""
    job_after_loop_s: float = 120.0
    """From the end of the loop to the end of its job: ranks finish a step, Slurm kills what stays (KillWait 30 s)."""
    unsubmitted_s: float = 60.0
    """A run folder without a job: its client died between two lines of `submit`."""


SLURM_PATIENCE = Patience()
# One machine, one filesystem, and asking costs a look at /proc.
LOCAL_PATIENCE = Patience(
    longest_look_s=0.5, first_ask_s=0.5, longest_ask_s=2.0, visible_after_completed_s=2.0, visible_after_killed_s=1.0
)


@dataclass(frozen=True)
class Ended:
    """The run is over: what its files say, and its job's last state where that was asked."""

    own: OwnFiles
    job: JobStatus | None


class Waiter:
    """Looks at one run until it is over.

    Args:
        folder: the run.
        ask: the job's state now, at most so many seconds old; None: no job was submitted.
        patience: see above.
        now: a monotonic clock in seconds; tests bring their own.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        ask: Callable[[float], JobStatus | None],
        patience: Patience,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._ask = ask
        self._patience = patience
        self._now = now
        self._look_s = patience.first_look_s
        self._ask_s = patience.first_ask_s
        self._next_ask = now() + patience.first_ask_s
        self._settled_at: float | None = None
        self._loop_over_at: float | None = None
        self._job: JobStatus | None = None

    @property
    def job(self) -> JobStatus | None:
        """The job's state when Slurm was last asked."""
        return self._job

    def step(self) -> Ended | float:
        """Look once. Returns: the end, or how many seconds to wait before the next step."""
        own = read_own_files(self._folder)
        if own.has_result or (own.outcome is not None and self._outcome_suffices(own)):
            return Ended(own, self._job)
        now = self._now()
        if own.outcome is not None and self._loop_over_at is None:
            self._loop_over_at = now
            self._next_ask = now  # why it is over is worth asking at once
        if self._loop_over_at is not None and now - self._loop_over_at >= self._patience.job_after_loop_s:
            return Ended(own, self._job)
        if self._settled_at is None and now >= self._next_ask:
            self._question(own, now)
        if self._settled_at is not None:
            if now - self._settled_at >= self._allowance(own):
                return self._ended_or_not(now)
            return min(0.5, self._patience.longest_look_s)
        pause, self._look_s = self._look_s, min(self._look_s * 1.5, self._patience.longest_look_s)
        return pause

    def _ended_or_not(self, now: float) -> Ended | float:
        """The job has ended and its files had time to arrive. One may be the news of a job that goes on."""
        own = read_own_files(self._folder)
        if own.submitted is not None and own.outcome is None:
            self._job = self._ask(0.0)
            if self._job is not None and not self._job.state.finished:
                self._settled_at = None
                self._next_ask = now + self._patience.first_ask_s
                return min(0.5, self._patience.longest_look_s)
        return Ended(own, self._job)

    def _question(self, own: OwnFiles, now: float) -> None:
        before = self._job
        self._job = self._ask(self._patience.first_ask_s)
        if self._job is None or self._job.state.finished:
            self._settled_at = now
            return
        if self._job.state is JobState.UNKNOWN and (before is None or before.reason != self._job.reason):
            _LOG.warning("run %s: its job's state is not known now: %s", self._folder.run_id, self._job.reason)
        moved = before is None or before.state is not self._job.state
        self._ask_s = (
            self._patience.first_ask_s
            if moved or own.outcome is not None
            else min(self._ask_s * 1.5, self._patience.longest_ask_s)
        )
        self._next_ask = now + self._ask_s

    def _outcome_suffices(self, own: OwnFiles) -> bool:
        """Whether outcome.json alone tells how the run ended.

        Not if a function's return value must still become visible, and not if the job was killed from outside: only
        Slurm knows whether that was the time limit, memory or a hand.
        """
        outcome = own.outcome or {}
        has_value = own.spec.get("command") is None and own.spec.get("kind") in ("run", "driver")
        if outcome.get("state") == "succeeded":
            return not has_value
        if outcome.get("reason") == "loop":  # a function that raised has written result.pkl
            exit_code = outcome.get("exit_code")
            return not has_value and isinstance(exit_code, int) and exit_code < _SIGNALLED
        return outcome.get("reason") in ("setup", "gateway", "worker")

    def _allowance(self, own: OwnFiles) -> float:
        if self._job is None:
            return self._patience.unsubmitted_s
        if own.outcome is not None and own.outcome.get("state") == "failed":
            return 0.0  # both have spoken
        if self._job.start is None and self._job.state is not JobState.COMPLETED:
            return 0.0  # it never ran, so there is nothing to wait for
        completed = self._job.state is JobState.COMPLETED
        return self._patience.visible_after_completed_s if completed else self._patience.visible_after_killed_s
