"""The first node of a job: it keeps the run's record and, for a run, the gateway and the user's loop."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from launch import hub_view, parting, process_tree, progress, scontrol
from launch.chain import MAX_IN_VAIN, SCANCELLED
from launch.children import Child, loop_argv, loop_environment
from launch.further_workers import FurtherWorkers, ServedRun
from launch.gateway_client import GatewayAddress, close_worker, read_address
from launch.gateway_keeper import GatewayKeeper
from launch.job_spec import JobSpec
from launch.log_tail import error_line, last_lines, last_traceback
from launch.node import CLOSE_GRACE_S, LISTING_POLL_S, POLL_S, Node, Place
from launch.ranks_keeper import RanksKeeper
from launch.run_record import RunRecord
from launch.tenure import Tenure
from tinker_hpc.config import load_config
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.patience import passes, until_written
from tinker_hpc.run_folder import RunFolder

TERM_GRACE_S = 4.0
"""Between TERM and KILL. Slurm itself kills KillWait after its TERM (default 30 s)."""
_SIGNAL_LAG_S = 0.3
_HANDED_OVER = 75
"""Exit code of a job that stopped before its time limit (sysexits.h: try again later): not 0, or its successor, which
waits for a bad end, would not start."""


class FirstNode(Node):
    """The node that owns the run's record; for a run also the gateway and the loop."""

    def __init__(self, spec: JobSpec, run_folder: RunFolder, place: Place, *, user_umask: int = 0o077) -> None:
        super().__init__(spec, run_folder, place)
        self._user_umask = user_umask
        self.has_loop = spec.kind in ("run", "driver")
        self.has_ranks = spec.kind != "driver"
        self.record = RunRecord(run_folder, writes_status=spec.kind == "run")
        self.gateway = GatewayKeeper(spec, run_folder, self.record)
        self.further = FurtherWorkers(run_folder)
        self.served = ServedRun(run_folder, spec.serves_run) if spec.serves_run else None
        self._next_look = 0.0
        self._leave_at: float | None = None
        self.tenure = Tenure(spec, run_folder, place, self.record)
        self.ranks: RanksKeeper | None = None
        self.loop: Child | None = None
        self._loop_since: dict[str, Any] = {}
        self._num_loops_in_vain = 0
        self._seen_ended: set[int] = set()

    def run(self) -> int:
        exit_code = self.tenure.take()
        if exit_code is not None:
            return exit_code
        job = {"job_id": self.place.job_id, "host": self.place.hostname, "pid": os.getpid()}
        self.record.event(
            "started", attempt=self.tenure.number, nodes=self.spec.nodes, executor=self.place.executor, **job
        )
        if self.has_loop:
            self.record.worker_status("starting", "its job has begun")  # before a gateway reads what the last job left
            self.gateway.start()
        if self.has_ranks:
            self.ranks = RanksKeeper(self, self.record, attempt=self.tenure.number, has_loop=self.has_loop)
            self.ranks.start()
        while True:
            exit_code = self._step()
            if exit_code is not None:
                return exit_code
            time.sleep(POLL_S)

    def _step(self) -> int | None:
        """One look at everything. An exit code ends the job."""
        for number in self.take_signals():
            self.record.event("signal", signal=signal.Signals(number).name)
            if number != signal.SIGUSR2:  # USR2 announces; there may be a minute of work left
                return self._stopped(number)
        self.tenure.step()
        if self.tenure.lost_to is not None:
            return self._superseded(self.tenure.lost_to)
        if self.tenure.cancelled:
            return self._end(128 + signal.SIGTERM, "cancelled", "cancelled on request", orderly=False)
        if self.tenure.must_hand_over():
            near = f"the time limit of {self.spec.time_limit_min} min is near"
            return self._hand_over(_HANDED_OVER, "time_limit", near, ends_at=self.tenure.end_time)
        if self.place.executor == "local" and time.time() - self.started_at > 60 * self.spec.time_limit_min:
            return self._end(
                128 + signal.SIGTERM,
                "time_limit",
                f"the time limit of {self.spec.time_limit_min} min is over (`time` sets it)",
            )
        if self._just_ended():
            # Slurm signals every process of the job, and a child may be gone before our own signal is handled: whether
            # it ended by itself is known a moment later.
            time.sleep(_SIGNAL_LAG_S)
            return None
        if self.ranks is not None:
            if num_hung := self.end_stopped():
                self.record.event("ranks_hung", processes=num_hung)
            self.ranks.step()
        if not self.has_loop:
            return self._session_step()
        self.further.step()
        if (failure := self.gateway.step(in_use=self.loop is not None)) is not None:
            return self._end(1, "gateway", failure)
        return self._watch_loop()

    def _just_ended(self) -> bool:
        """Whether the ranks' agent or the loop ended since the last look."""
        ended = {child.pid for child in (self.agent, self.loop) if child is not None and child.exit_code() is not None}
        fresh = ended - self._seen_ended
        self._seen_ended |= ended
        return bool(fresh)

    def _session_step(self) -> int | None:
        assert self.agent is not None and self.ranks is not None
        if self.ranks.error is not None:
            return self._end(1, "worker", self.ranks.error)
        if self.agent.exit_code() == 0:
            return self._end(0, "closed", None)
        if self.served is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LISTING_POLL_S
            return self._look_at_served_run(self.served)
        return None

    def _look_at_served_run(self, served: ServedRun) -> int | None:
        """End with the run this worker is for: after a while where the ranks were asked to close, else at once."""
        if self._leave_at is None and served.in_order():
            self._leave_at = time.monotonic() + CLOSE_GRACE_S
        if self._leave_at is not None:
            return self._end(0, "closed", None) if time.monotonic() >= self._leave_at else None
        why = served.gone()
        return None if why is None else self._end(1, "run_gone", why)

    # -- the loop -----------------------------------------------------------------------------------------------

    def _watch_loop(self) -> int | None:
        if self.loop is None:
            address = self.gateway.address()
            return None if address is None else self._start_loop(address)
        code = self.loop.exit_code()
        if code is None:
            return None
        self.record.event("loop_ended", exit_code=code)
        if code == 0:
            return self._end(0, "loop", None)
        if self._loop_goes_on(code):
            return None
        text = self.loop.log_text()
        error = error_line(text) or last_lines(text, 3) or f"the loop ended with exit code {code} and printed nothing"
        if self.ranks is not None and self.ranks.error is not None:
            error = f"{error} (before that, {self.ranks.error})"
        return self._end(code, "loop", error, traceback=last_traceback(text))

    def _loop_goes_on(self, code: int) -> bool:
        """Whether a loop that was killed is started again, from its beginning, as after the loss of its node.

        One that raised is not: it would raise again. Nor one killed for want of memory, or thrice without asking
        anything new in between.
        """
        if code not in (128 + signal.SIGKILL, 128 + signal.SIGTERM) or self.memory_kills():
            return False
        asked = progress.marks(self.run_folder)["requests"] != self._loop_since.get("requests")
        self._num_loops_in_vain = 0 if asked else self._num_loops_in_vain + 1
        if self._num_loops_in_vain >= MAX_IN_VAIN:
            return False
        self.record.event("loop_restarted", exit_code=code)
        self.loop = None
        return True

    def _start_loop(self, address: GatewayAddress) -> int | None:
        self.record.event("gateway_ready", base_url=address.base_url)
        self._loop_since = progress.marks(self.run_folder)
        until_written(self.run_folder.begin_loop)
        argv = loop_argv(self.spec, self.run_folder)
        env = loop_environment(self.spec, os.environ, base_url=address.base_url, api_key=address.api_key)
        try:
            env |= self._hub_environment()
        except (TinkerHpcError, OSError) as error:
            if isinstance(error, OSError) and passes(error):
                return None  # the next step tries again
            return self._end(1, "setup", f"cannot show the loop its base models' folders: {error}")
        folder = self.spec.working_folder or os.path.expanduser("~")
        if not os.path.isdir(folder):
            return self._end(
                1,
                "setup",
                f"the working folder {folder} does not exist on node {self.place.hostname}. Submit from a folder on "
                "the shared filesystem.",
            )
        try:
            log = self.run_folder.logs / "loop.log"
            self.loop = Child("loop", argv, env, log, cwd=folder, umask=self._user_umask)
        except OSError as error:
            if passes(error):
                return None
            return self._end(127, "setup", f"cannot start {argv[0]!r} on node {self.place.hostname}: {error.strerror}")
        self.record.event("loop_started", pid=self.loop.pid)
        return None

    def _hub_environment(self) -> dict[str, str]:
        """HF_HUB_CACHE for the loop, where the configuration gives hub names folders."""
        mapping = load_config().base_models
        if not mapping:
            return {}
        view = hub_view.build(self.run_folder.path / "hub", mapping, hub_view.cache_folder(os.environ))
        return {"HF_HUB_CACHE": str(view)}

    # -- the end ------------------------------------------------------------------------------------------------

    def _stopped(self, number: int) -> int:
        """TERM or INT: somebody wants this job to end. Ask Slurm who; where it does not say, guess."""
        limit = f"the time limit of {self.spec.time_limit_min} min is over (`time` sets it)"
        near_limit = time.time() > self.started_at + 60 * self.spec.time_limit_min - 60
        asked = self.run_folder.cancel.exists()
        errors = {
            "cancelled": "cancelled on request" if asked else "cancelled with scancel",
            "time_limit": limit,
            "preempted": "preempted by a job of higher priority",
            "signal": f"ended by {signal.Signals(number).name}",
        }
        guess = "cancelled" if asked else "time_limit" if near_limit else "signal"
        on_slurm = self.place.executor == "slurm"
        said, ends_at = scontrol.why_ending(self.place.job_id) if on_slurm else (None, None)
        reason = said or guess
        error = errors[reason]
        if reason == "cancelled" and not asked:
            reason = SCANCELLED  # by whom, the next job asks accounting
        return self._hand_over(
            128 + number, "cancelled" if asked else reason, error, ends_at=ends_at, asked_by_slurm=on_slurm
        )

    def _hand_over(
        self, exit_code: int, reason: str, error: str, *, ends_at: float | None, asked_by_slurm: bool = False
    ) -> int:
        """End this job for something that is not the run's own doing. The next job goes on, if the rule says so.

        Args: see Tenure.parting_s.
        """
        parted_by = time.monotonic() + self.tenure.parting_s(ends_at=ends_at, asked_by_slurm=asked_by_slurm)
        ruling = self.tenure.after(reason, error, exit_code)
        if not ruling.goes_on:
            return self._end(exit_code, ruling.reason, ruling.why, orderly=False, parted_by=parted_by)
        self.record.event("handed_over", reason=reason, error=error)
        self.record.worker_status("queued", f"{error}; the run goes on in its next job")
        self._end_everything(parted_by)
        self.tenure.leave(reason, error, exit_code, goes_on=True)
        return exit_code

    def _end_everything(self, parted_by: float) -> None:
        """TERM, then KILL. Until `parted_by`, on the monotonic clock, ranks may put their state away; those that have
        none yet end by the TERM.
        """

        def parts() -> bool:
            self.tenure.beat()
            return self.agent is not None and self.agent.exit_code() is None

        patience_s = parted_by - time.monotonic()
        parting.end_below(os.getpid(), parts=parts, patience_s=patience_s, grace_s=TERM_GRACE_S)

    def _superseded(self, by: int) -> int:
        """Another job works on the run: end everything at once, and write nothing that is not ours alone."""
        process_tree.end_below(os.getpid(), grace_s=0.0)
        self.record.event("superseded", by=by, attempt=self.tenure.number)
        self.say(f"attempt {by} works on the run now; this job ({self.place.job_id}) ended everything it had started.")
        self.tenure.give_way(by)
        return 1

    def _end(
        self,
        exit_code: int,
        reason: str,
        error: str | None,
        *,
        traceback: str | None = None,
        orderly: bool = True,
        parted_by: float | None = None,
    ) -> int:
        """Write the outcome, then take everything down: ask, TERM, KILL.

        Args:
            orderly: the run is over, and the ranks are asked to close. Else they put their state away, for `resume`.
            parted_by: until when, on the monotonic clock; None: for as long as it may take at most.
        """
        elsewhere = self.ranks.kills_elsewhere if self.ranks else 0
        kills = self.memory_kills() + elsewhere
        if exit_code and kills and reason not in ("cancelled", "time_limit", "preempted"):
            asked = self.spec.memory_per_node or "the cluster's default"
            reason = "out_of_memory"
            error = f"{kills} of its processes were killed for want of memory (asked for: {asked} per node); {error}"
        self.record.outcome(exit_code=exit_code, reason=reason, error=error, traceback=traceback)
        ending = "the run is over" if error is None else error
        # Ranks still loading have nothing to put away and would hear the request only when they are done.
        close_deadline = time.monotonic() + CLOSE_GRACE_S
        if orderly and self.has_loop and (self.record.worker_phase == "ready" or not self.has_ranks):
            self._close_worker()
        if self.has_loop:
            self.further.end(deadline=close_deadline if orderly else 0.0)
        self.record.worker_status("ended", ending, error=None if exit_code == 0 else error)
        if orderly:
            process_tree.end_below(os.getpid(), grace_s=TERM_GRACE_S)
        else:
            self._end_everything(parted_by or time.monotonic() + parting.LONGEST_S)
        self.tenure.leave(reason, error, exit_code, goes_on=False)
        return exit_code

    def _close_worker(self) -> None:
        """Ask the ranks to end by themselves, through the log like every request."""
        address = read_address(self.run_folder)
        if address is None or not close_worker(address) or self.agent is None:
            return
        deadline = time.monotonic() + CLOSE_GRACE_S
        while self.agent.exit_code() is None and time.monotonic() < deadline:
            if any(number != signal.SIGUSR2 for number in self.take_signals()):
                return
            time.sleep(POLL_S)
