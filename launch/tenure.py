"""One job's time with a run: whether it may work on it at all, until when, and what comes after it.

`take` claims the run, asks the rule (chain.py) whether it goes on, and submits the successor before any work begins.
`step` then looks once a second whether the run was taken over or cancelled, and whether it is time to hand over.
`leave` says how the time ended and sees to it that the next job comes, or that none does.
"""

from __future__ import annotations

import os
import time

from launch import attempts, parting, sacct, scontrol
from launch.chain import SCANCELLED, SUPERSEDED, UNEXPLAINED, Attempt, Verdict, explained, verdict
from launch.host import Host, LocalHost
from launch.job_spec import JobSpec
from launch.node import LISTING_POLL_S, Place
from launch.progress import Credit, credit_of
from launch.run_record import RunRecord, listed
from launch.successor import Successor, take_back
from tinker_hpc.errors import SlurmUnavailableError
from tinker_hpc.run_folder import RunFolder

HANDOVER_MARGIN_S = 20.0
"""Before the time limit: the ranks put their state away, and the successor must find an end that was written down."""
_REQUEUE_S = 10.0
"""Of it: for Slurm to take the job back where it has to (no successor waits in the queue)."""
_CANCEL_PATIENCE_S = 6.0
"""From cancel.json to ending by ourselves: scancel follows it at once, and then Slurm knows who ended the job."""


class Tenure:
    """See above. One instance, on the first node."""

    def __init__(
        self, spec: JobSpec, run_folder: RunFolder, place: Place, record: RunRecord, host: Host | None = None
    ) -> None:
        self._spec = spec
        self._run_folder = run_folder
        self._place = place
        self._record = record
        self._host = host or LocalHost()
        self._on_slurm = place.executor == "slurm"
        self._successor = Successor(spec, run_folder, self._host, place.job_id) if self._on_slurm else None
        self._credit: Credit = credit_of(spec.kind)
        self._past: list[Attempt] = []
        """Known once the run is taken: at the end, within a preemption's grace, nobody has the time to ask again."""
        self._next_look = 0.0
        self._next_beat = 0.0
        self._cancel_seen_at: float | None = None
        self.number = 0
        """Of this attempt."""
        self.lost_to: int | None = None
        """The attempt that has taken over."""
        self.cancelled = False
        self.end_time = 0.0
        """Unix seconds: when Slurm will end the job."""
        self.kill_wait_s = parting.KILL_WAIT_S
        """From Slurm's TERM to its KILL."""

    # -- the beginning ------------------------------------------------------------------------------------------

    def take(self) -> int | None:
        """Claim the run. None: work may begin. Else: this job's exit code, there is nothing to do."""
        if listed(self._run_folder.outcome):
            self._place.say("the run is over already; nothing to do.")
            self._take_back()
            return 0
        self.number = attempts.begin(
            self._run_folder, {"job_id": self._place.job_id, "host": self._place.hostname, "pid": os.getpid()}
        )
        if not listed(self._run_folder.cancel):
            self._step_successor()  # before anything that takes time: from here on the run survives this job
        waited_s = attempts.wait_until_gone(self._run_folder, self.number - 1) if self.number > 1 else 0.0
        past = self._past = self._find_past()
        ruling = verdict(past, cancelled=listed(self._run_folder.cancel))
        self._record.event(
            "claimed", attempt=self.number, job_id=self._place.job_id, host=self._place.hostname, waited_s=waited_s,
            after=past[-1].reason if past else None,
        )  # fmt: skip
        if listed(self._run_folder.outcome):  # the one before wrote it while we waited
            self._leave_note(SUPERSEDED, "the run was over", exit_code=0)
            self._take_back()
            return 0
        if not ruling.goes_on:
            self._place.say(f"the run does not go on: {ruling.why}.")
            code = past[-1].exit_code if past else 1
            self._record.outcome(exit_code=code or 1, reason=ruling.reason, error=ruling.why)
            self._leave_note(ruling.reason, ruling.why, exit_code=0)
            self._take_back()
            return 0
        self.end_time = self._find_end_time()
        if self._on_slurm:
            self.kill_wait_s = scontrol.kill_wait_s(self._host) or parting.KILL_WAIT_S
        return None

    def _find_past(self) -> list[Attempt]:
        """The attempts before this one. Accounting, which may take a minute, is asked only where it adds something."""
        past = attempts.history(self._run_folder, credit=self._credit, before=self.number)
        if past and self._on_slurm and past[-1].reason in UNEXPLAINED:
            past[-1] = explained(past[-1], self._slurm_state(past[-1].job_id), uid=os.getuid())
        return past

    def _slurm_state(self, job_id: str) -> str:
        """Slurm's word for how a job ended; "" if it does not say. A requeued job's id is our own, still running."""
        if job_id == self._place.job_id:
            return ""
        try:
            rows = sacct.query(self._host, [job_id], submitted_since=time.time() - 30 * 86_400)
        except SlurmUnavailableError:
            return ""
        mine = [row for row in rows or [] if row.name == self._spec.run_id and row.status.state.finished]
        return mine[-1].status.slurm_state if mine else ""

    def _find_end_time(self) -> float:
        limit = time.time() + 60 * self._spec.time_limit_min
        if not self._on_slurm:
            return limit
        return scontrol.end_time(self._place.job_id, self._host) or limit

    # -- meanwhile ----------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Say that this job still has to do with the run."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + attempts.BEAT_S
            attempts.beat(self._run_folder, self.number)

    def step(self) -> None:
        """Beat, and look around. Sets `lost_to` and `cancelled`."""
        self.beat()
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LISTING_POLL_S
        holder = attempts.holder(self._run_folder)
        if holder > self.number:
            self.lost_to = holder
            return
        if listed(self._run_folder.cancel):
            self._cancel_seen_at = self._cancel_seen_at or now
            self.cancelled = now - self._cancel_seen_at > _CANCEL_PATIENCE_S
        else:
            self._step_successor()

    def must_hand_over(self) -> bool:
        """Whether to stop work now because the time limit is near and another job will go on.

        Without one, or without progress (then nobody goes on), the job is used to its last second.
        """
        return (
            self._on_slurm
            and time.time() >= self.end_time - HANDOVER_MARGIN_S
            and self._successor is not None
            and self._successor.how is not None
            and attempts.progressed(self._run_folder, self.number, credit=self._credit)
        )

    def parting_s(self, *, ends_at: float | None, asked_by_slurm: bool) -> float:
        """How long the ranks may take to put their state away, from now.

        Args:
            ends_at: when Slurm will kill the job (unix seconds), as far as it said.
            asked_by_slurm: it has sent TERM.
        """
        killed_in_s = None
        if ends_at is not None:
            killed_in_s = ends_at - time.time()
        elif asked_by_slurm:
            killed_in_s = self.kill_wait_s
        if killed_in_s is not None and self._successor is not None and self._successor.how == "requeue":
            killed_in_s -= _REQUEUE_S
        return parting.patience_s(killed_in_s=killed_in_s)

    def _step_successor(self) -> None:
        if self._successor is None or not self._successor.step():
            return
        self._record.event("successor", how=self._successor.how, trouble=self._successor.trouble)
        if self._successor.trouble:
            self._place.say(f"no job will follow this one yet: {self._successor.trouble}")

    # -- the end ------------------------------------------------------------------------------------------------

    def after(self, reason: str, error: str | None, exit_code: int) -> Verdict:
        """What the rule says if this attempt ends for that reason. Where no job can follow, the run does not go on."""
        this = Attempt(
            self.number,
            self._place.job_id,
            reason,
            attempts.progressed(self._run_folder, self.number, credit=self._credit),
            error,
            exit_code,
        )
        ruling = verdict([*self._past, this], cancelled=reason == "cancelled")
        why = error or ruling.why
        if ruling.goes_on:
            if self._successor is not None and self._successor.how is not None:
                return ruling
            if self._successor is not None:
                why += f"; no job follows this one: {self._successor.trouble or 'Slurm did not answer'}"
            return Verdict(False, why, "cancelled" if reason == SCANCELLED else reason)
        if reason != "cancelled" and ruling.why != why:
            why += f"; {ruling.why}"
        return Verdict(False, why, ruling.reason)

    def leave(self, reason: str, error: str | None, exit_code: int, *, goes_on: bool) -> None:
        """Write how the attempt ended, everything it started being gone. Then the next job comes, or none."""
        self._leave_note(reason, error, exit_code=exit_code)
        if not goes_on:
            self._take_back()
        elif self._successor is not None and self._successor.how == "requeue" and not self._successor.requeue():
            self._place.say("Slurm did not put this job into the queue again.")

    def give_way(self, by: int) -> None:
        """Say that everything this attempt had started is gone, so that the one that took over may begin."""
        self._leave_note(SUPERSEDED, f"attempt {by} took over", exit_code=1)

    def _leave_note(self, reason: str, error: str | None, *, exit_code: int) -> None:
        made = attempts.progressed(self._run_folder, self.number, credit=self._credit)
        attempts.end(self._run_folder, self.number, reason=reason, error=error, exit_code=exit_code, progressed=made)

    def _take_back(self) -> None:
        if self._on_slurm:
            take_back(self._run_folder, self._host, own_job_id=self._place.job_id, run_id=self._spec.run_id)
