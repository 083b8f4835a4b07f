"""The first node of a job: it keeps the run's record and, for a run, the gateway and the user's loop."""

from __future__ import annotations

import os
import random
import signal
import socket
import time

from launch import hub_view, memory_kills, process_tree, scontrol
from launch.children import Child, loop_argv, loop_environment
from launch.further_workers import FurtherWorkers, ServedRun
from launch.gateway_client import GatewayAddress, close_worker, read_address
from launch.gateway_keeper import GatewayKeeper
from launch.job_spec import JobSpec
from launch.log_tail import error_line, last_lines, last_traceback, num_failed_starts
from launch.node import CLOSE_GRACE_S, LISTING_POLL_S, POLL_S, Node, Place
from launch.run_record import RunRecord, claim, listed
from tinker_hpc.config import load_config
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.run_folder import RunFolder, read_json, write_json

_EARLY_STARTS = 2
"""Ranks that fail before they are ready get one more chance (a port taken, a filesystem that lags), not three."""
TERM_GRACE_S = 4.0
"""Between TERM and KILL. Slurm itself kills KillWait after its TERM (default 30 s)."""


class FirstNode(Node):
    """The node that owns the run's record; for a run also the gateway and the loop."""

    def __init__(self, spec: JobSpec, run_folder: RunFolder, place: Place) -> None:
        super().__init__(spec, run_folder, place)
        self.has_loop = spec.kind == "run"
        self.record = RunRecord(run_folder, writes_status=self.has_loop)
        self.gateway = GatewayKeeper(spec, run_folder, self.record)
        self.further = FurtherWorkers(run_folder)
        self.served = ServedRun(run_folder, spec.serves_run) if spec.serves_run else None
        self.loop: Child | None = None
        self._next_listing = 0.0
        self._next_look = 0.0
        self._leave_at: float | None = None
        self._worker_error: str | None = None

    def run(self) -> int:
        job = {"job_id": self.place.job_id, "host": self.place.hostname, "pid": os.getpid()}
        first = claim(self.run_folder, job)
        if first is not None:
            self.say(
                f"run {self.spec.run_id} was begun by job {first.get('job_id')} on {first.get('host')} already; this "
                f"job ({self.place.job_id}) leaves it alone."
            )
            return 1
        self.record.event("started", nodes=self.spec.nodes, executor=self.place.executor, **job)
        self.record.worker_status("starting", f"loading {self.spec.base_model} on {self.spec.world_size} ranks")
        if self.has_loop:
            self.gateway.start()
        self.start_agent(self._open_rendezvous())
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
        if self.place.executor == "local" and time.time() - self.started_at > 60 * self.spec.time_limit_min:
            return self._end(
                128 + signal.SIGTERM,
                "time_limit",
                f"the time limit of {self.spec.time_limit_min} min is over (`time` sets it)",
            )
        self._watch_worker()
        if not self.has_loop:
            return self._session_step()
        self.further.step()
        if (failure := self.gateway.step(in_use=self.loop is not None)) is not None:
            return self._end(1, "gateway", failure)
        return self._watch_loop()

    # -- the worker ---------------------------------------------------------------------------------------------

    def _open_rendezvous(self) -> tuple[str, int] | None:
        """Where the nodes' agents meet; published for the other nodes."""
        if self.spec.nodes == 1:
            return None
        endpoint = {"host": self.place.hostname, "port": _free_port()}
        write_json(self.run_folder.worker(0).rendezvous, endpoint)
        return self.place.hostname, endpoint["port"]

    def _watch_worker(self) -> None:
        """Follow the ranks: `ready` once they say so, `ended` when an agent gave up."""
        assert self.agent is not None
        if self._worker_error is not None:
            return
        code = self.agent.exit_code()
        if code is not None and code != 0:
            self._worker_gone(self.agent_failure(code))
        elif code == 0 and self.has_loop:
            self._worker_gone("the worker ended by itself, without a close request from this run")
        if time.monotonic() < self._next_listing:
            return
        if self.record.worker_phase == "starting" and num_failed_starts(self.agent.log_text()) >= _EARLY_STARTS:
            # Ranks that were never ready have nothing to resume, and loading a large model takes minutes each time.
            why = self.agent_failure(1)
            self.agent.kill()
            self._worker_gone(why)
            return
        self._next_listing = time.monotonic() + (LISTING_POLL_S if self.record.worker_phase == "ready" else POLL_S)
        for node_rank in range(1, self.spec.nodes):
            if listed(path := self.failure_file(node_rank)):
                failure = read_json(path) or {}
                self._kills_elsewhere += int(failure.get("memory_kills", 0))
                self._worker_gone(str(failure.get("error")))
        # The worker's first words in the result log are that it takes requests. Whether there are any is enough here.
        if self.record.worker_phase == "starting" and os.listdir(self.run_folder.worker(0).results):
            self.record.worker_status("ready", "")
            self.record.event("worker_ready")

    def _worker_gone(self, why: str) -> None:
        """From here on the gateway answers every open future with this error."""
        if self._worker_error is None:
            self._worker_error = why
            self.record.worker_status("ended", "the worker failed", error=why)
            self.record.event("worker_ended", error=why)
            self.say(why)

    def _session_step(self) -> int | None:
        assert self.agent is not None
        if self._worker_error is not None:
            return self._end(1, "worker", self._worker_error)
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
        text = self.loop.log_text()
        error = error_line(text) or last_lines(text, 3) or f"the loop ended with exit code {code} and printed nothing"
        if self._worker_error is not None:
            error = f"{error} (before that, {self._worker_error})"
        return self._end(code, "loop", error, traceback=last_traceback(text))

    def _start_loop(self, address: GatewayAddress) -> int | None:
        self.record.event("gateway_ready", base_url=address.base_url)
        argv = loop_argv(self.spec, self.run_folder)
        env = loop_environment(self.spec, os.environ, base_url=address.base_url, api_key=address.api_key)
        try:
            env |= self._hub_environment()
        except (TinkerHpcError, OSError) as error:
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
            self.loop = Child("loop", argv, env, self.run_folder.logs / "loop.log", cwd=folder)
        except OSError as error:
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
        errors = {
            "cancelled": "cancelled on request" if self.run_folder.cancel.exists() else "cancelled with scancel",
            "time_limit": limit,
            "preempted": "preempted by a job of higher priority",
            "signal": f"ended by {signal.Signals(number).name}",
        }
        guess = "cancelled" if self.run_folder.cancel.exists() else "time_limit" if near_limit else "signal"
        reason = (scontrol.why_ending(self.place.job_id) if self.place.executor == "slurm" else None) or guess
        return self._end(128 + number, reason, errors[reason], orderly=False)

    def _end(
        self, exit_code: int, reason: str, error: str | None, *, traceback: str | None = None, orderly: bool = True
    ) -> int:
        """Write the outcome, then take everything down: ask, TERM, KILL."""
        kills = memory_kills.count() - self._kills_before + self._kills_elsewhere
        if exit_code and kills and reason not in ("cancelled", "time_limit", "preempted"):
            asked = self.spec.memory_per_node or "the cluster's default"
            reason = "out_of_memory"
            error = f"{kills} of its processes were killed for want of memory (asked for: {asked} per node); {error}"
        self.record.outcome(exit_code=exit_code, reason=reason, error=error, traceback=traceback)
        ending = "the run is over" if error is None else error
        # Ranks still loading have nothing to put away and would hear the request only when they are done.
        close_deadline = time.monotonic() + CLOSE_GRACE_S
        if orderly and self.has_loop and self.record.worker_phase == "ready":
            self._close_worker()
        if self.has_loop:
            self.further.end(deadline=close_deadline if orderly else 0.0)
        self.record.worker_status("ended", ending, error=None if exit_code == 0 else error)
        process_tree.end_below(os.getpid(), grace_s=TERM_GRACE_S)
        return exit_code

    def _close_worker(self) -> None:
        """Ask the ranks to end by themselves, through the log like every request."""
        assert self.agent is not None
        address = read_address(self.run_folder)
        if address is None or not close_worker(address):
            return
        deadline = time.monotonic() + CLOSE_GRACE_S
        while self.agent.exit_code() is None and time.monotonic() < deadline:
            if any(number != signal.SIGUSR2 for number in self.take_signals()):
                return
            time.sleep(POLL_S)


def _free_port() -> int:
    """A port nobody listens on, from below the range the kernel gives to outgoing connections."""
    for _ in range(100):
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 30000 on this node")
