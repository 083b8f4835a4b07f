"""What runs once per node inside a job, whatever started the job: it starts the rest, watches it, and ends it.

    first node of a run      gateway, torch's elastic agent (the node's ranks), the user's loop
    first node of a session  the agent
    every other node         the agent

The loop starts when the gateway answers; nobody waits for the worker, the SDK does that. The job's exit code is the
loop's. A supervisor deletes nothing, leaves no process behind, and never leaves the loop waiting for something that
will not come: a gateway that dies is started again, a worker that is gone for good is declared `ended`.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch import memory_kills, process_tree
from launch.children import (
    Child,
    agent_argv,
    agent_environment,
    gateway_argv,
    gateway_environment,
    loop_argv,
    loop_environment,
)
from launch.gateway_client import GatewayAddress, answers, close_worker, read_address
from launch.job_spec import JobSpec
from launch.log_tail import error_line, last_lines, last_traceback, worker_words
from launch.run_record import RunRecord, claim, listed
from tinker_hpc.run_folder import RunFolder, read_json, write_json

_POLL_S = 0.1
_LISTING_POLL_S = 1.0
"""How often the shared filesystem is asked for files of other nodes."""
_RENDEZVOUS_PATIENCE_S = 600.0
"""Nodes of one job may start minutes apart on a busy cluster (prolog scripts, image caches)."""
_CLOSE_GRACE_S = 30.0
"""How long the ranks get to end by themselves after the close request."""
_TERM_GRACE_S = 4.0
"""Between TERM and KILL. Slurm itself kills KillWait after its TERM (default 30 s)."""
_GATEWAY_RESTARTS = 5
_GATEWAY_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Place:
    """Which node of which job this process is on."""

    job_id: str
    node_rank: int
    hostname: str
    executor: str

    @classmethod
    def here(cls) -> Place:
        """Read from the environment that srun or submitit's local controller made."""
        executor = os.environ.get("SUBMITIT_EXECUTOR", "local")
        slurm = executor == "slurm"
        return cls(
            job_id=os.environ["SLURM_JOB_ID" if slurm else "SUBMITIT_LOCAL_JOB_ID"],
            node_rank=int(os.environ.get("SLURM_NODEID", "0")) if slurm else 0,
            hostname=socket.gethostname(),
            executor=executor,
        )


class Supervise:
    """The callable submitit pickles; only a path travels."""

    def __init__(self, run_folder: str) -> None:
        self.run_folder = run_folder

    def __call__(self) -> None:
        sys.exit(supervise(RunFolder(Path(self.run_folder)), Place.here()))


def supervise(run_folder: RunFolder, place: Place) -> int:
    """Run this node's part of a job to its end and return the exit code."""
    value = read_json(run_folder.spec)
    if value is None:
        print(f"tinker_hpc: no {run_folder.spec} on {place.hostname}: is the data root on a shared filesystem?")
        return 1
    spec = JobSpec.from_json(value)
    os.environ[process_tree.RUN_ID_VARIABLE] = spec.run_id
    process_tree.adopt_orphans()
    node = FirstNode(spec, run_folder, place) if place.node_rank == 0 else OtherNode(spec, run_folder, place)
    try:
        return node.run()
    finally:
        process_tree.end_below(os.getpid(), grace_s=_TERM_GRACE_S)


class _Node:
    """What both kinds of node share: signals, the agent, the log."""

    def __init__(self, spec: JobSpec, run_folder: RunFolder, place: Place) -> None:
        self.spec = spec
        self.run_folder = run_folder
        self.place = place
        self.started_at = time.time()
        self.agent: Child | None = None
        self._kills_before = memory_kills.count()  # a local job shares its cgroup with others
        self._kills_elsewhere = 0
        self._signals: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)  # nothing else: a handler that logs can interrupt itself

    def take_signals(self) -> list[int]:
        """The signals since the last call. SIGCONT is Slurm's companion to the others and means nothing."""
        taken, self._signals = self._signals, []
        return [number for number in taken if number != signal.SIGCONT]

    def start_agent(self, endpoint: tuple[str, int] | None) -> Child:
        """Start this node's ranks."""
        address = self.place.hostname
        if self.place.node_rank == 0 and self.spec.nodes > 1:
            # torch gives rank 0 to the address that sorts first. A number sorts before a name, so the first node says
            # its IP address: rank 0, which hears the gateway's bell, is then on the gateway's node.
            address = socket.gethostbyname(address)
        argv = agent_argv(
            self.spec,
            self.run_folder,
            node_rank=self.place.node_rank,
            own_address="localhost" if self.spec.nodes == 1 else address,
            endpoint=endpoint,
        )
        env = agent_environment(self.spec, os.environ, cores=len(os.sched_getaffinity(0)))
        self.agent = Child("worker", argv, env, self.run_folder.logs / f"worker-{self.place.node_rank}.log")
        return self.agent

    def agent_failure(self, exit_code: int) -> str:
        """Why the agent gave up: the rank's own error, else the log's last lines."""
        assert self.agent is not None
        said = worker_words(self.agent.log_text()).rstrip(".")
        return f"the worker ended on {self.place.hostname} with exit code {exit_code}: {said}. Log: {self.agent.log}"

    def say(self, text: str) -> None:
        """A line in this node's own log."""
        print(f"tinker_hpc {time.strftime('%H:%M:%S')} {self.place.hostname}: {text}", flush=True)

    def failure_file(self, node_rank: int) -> Path:
        """Where a node without a gateway reports that its ranks are gone for good."""
        return self.run_folder.slurm / f"node-{node_rank}-failed.json"


class OtherNode(_Node):
    """Every node but the first: ranks only. What happens to them is told to the first node by a file."""

    def run(self) -> int:
        rendezvous = self._rendezvous()
        if rendezvous is None:
            return 1
        agent = self.start_agent((rendezvous["host"], rendezvous["port"]))
        next_listing = 0.0
        deadline: float | None = None
        reported = False
        while True:
            if self.take_signals_to_stop():
                return 1
            code = agent.exit_code()
            if code == 0:
                return 0
            if code is not None and not reported:
                # Not an exit of ours: srun would kill the first node before the loop heard why.
                why = self.agent_failure(code)
                kills = memory_kills.count() - self._kills_before
                write_json(self.failure_file(self.place.node_rank), {"error": why, "memory_kills": kills})
                self.say(why)
                reported = True
            if time.monotonic() >= next_listing:
                next_listing = time.monotonic() + _LISTING_POLL_S
                if deadline is None and listed(self.run_folder.outcome):
                    deadline = time.monotonic() + (0 if reported else _CLOSE_GRACE_S)
            if deadline is not None and time.monotonic() >= deadline:
                return 0
            time.sleep(_POLL_S)

    def take_signals_to_stop(self) -> bool:
        """Whether a signal asks for the end (USR2 only announces it)."""
        return any(number in (signal.SIGTERM, signal.SIGINT) for number in self.take_signals())

    def _rendezvous(self) -> dict[str, Any] | None:
        path = self.run_folder.worker(0).rendezvous
        deadline = time.monotonic() + _RENDEZVOUS_PATIENCE_S
        while not listed(path):
            if self.take_signals_to_stop():
                return None
            if time.monotonic() > deadline:
                self.say(f"no {path} after {_RENDEZVOUS_PATIENCE_S:.0f} s: did the first node start?")
                return None
            time.sleep(_POLL_S)
        return read_json(path)


class FirstNode(_Node):
    """The node that owns the run's record; for a run also the gateway and the loop."""

    def __init__(self, spec: JobSpec, run_folder: RunFolder, place: Place) -> None:
        super().__init__(spec, run_folder, place)
        self.has_loop = spec.kind == "run"
        self.record = RunRecord(run_folder, writes_status=self.has_loop)
        self.gateway: Child | None = None
        self.loop: Child | None = None
        self._gateway_starts: list[float] = []
        self._next_listing = 0.0
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
            self._start_gateway()
        self.start_agent(self._open_rendezvous())
        while True:
            exit_code = self._step()
            if exit_code is not None:
                return exit_code
            time.sleep(_POLL_S)

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
        if (failure := self._watch_gateway()) is not None:
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
        self._next_listing = time.monotonic() + (_LISTING_POLL_S if self.record.worker_phase == "ready" else _POLL_S)
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
        return self._end(0, "closed", None) if self.agent.exit_code() == 0 else None

    # -- the gateway --------------------------------------------------------------------------------------------

    def _start_gateway(self) -> None:
        self._gateway_starts.append(time.monotonic())
        self.gateway = Child(
            "gateway",
            gateway_argv(self.run_folder),
            gateway_environment(self.spec, os.environ),
            self.run_folder.logs / "gateway.log",
        )

    def _watch_gateway(self) -> str | None:
        """Start a dead gateway again (same port, same key: the loop only sees a pause). A text: it is hopeless."""
        assert self.gateway is not None
        code = self.gateway.exit_code()
        if code is None:
            silent_s = time.monotonic() - self._gateway_starts[-1]
            if self.loop is None and silent_s > _GATEWAY_PATIENCE_S:
                return f"the gateway did not answer within {_GATEWAY_PATIENCE_S:.0f} s. Log: {self.gateway.log}"
            return None
        text = self.gateway.log_text()
        said = (error_line(text) or last_lines(text, 3)).rstrip(".")
        if self.loop is None:
            return f"the gateway could not start: {said}. Log: {self.gateway.log}"
        recent = [at for at in self._gateway_starts if time.monotonic() - at < 60]
        if len(recent) > _GATEWAY_RESTARTS:
            return f"the gateway ended {len(recent)} times within a minute: {said}. Log: {self.gateway.log}"
        self.record.event("gateway_restarted", exit_code=code, error=said)
        self.say(f"the gateway ended with exit code {code}; starting it again")
        time.sleep(min(1.0, 0.1 * len(recent)))
        self._start_gateway()
        return None

    def _gateway_address(self) -> GatewayAddress | None:
        """Where the gateway started last listens; None until it answers."""
        assert self.gateway is not None
        address = read_address(self.run_folder)
        return address if address and address.pid == self.gateway.pid and answers(address) else None

    # -- the loop -----------------------------------------------------------------------------------------------

    def _watch_loop(self) -> int | None:
        if self.loop is None:
            address = self._gateway_address()
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

    # -- the end ------------------------------------------------------------------------------------------------

    def _stopped(self, number: int) -> int:
        """TERM or INT: somebody wants this job to end, and Slurm does not say who."""
        name = signal.Signals(number).name
        limit_at = self.started_at + 60 * self.spec.time_limit_min
        if self.run_folder.cancel.exists():
            reason, error = "cancelled", "cancelled on request"
        elif time.time() > limit_at - 60:
            reason, error = "time_limit", f"the time limit of {self.spec.time_limit_min} min is over (`time` sets it)"
        else:
            reason, error = "signal", f"ended by {name}: preempted, or cancelled outside tinker_hpc"
        return self._end(128 + number, reason, error, orderly=False)

    def _end(
        self, exit_code: int, reason: str, error: str | None, *, traceback: str | None = None, orderly: bool = True
    ) -> int:
        """Write the outcome, then take everything down: ask, TERM, KILL."""
        kills = memory_kills.count() - self._kills_before + self._kills_elsewhere
        if exit_code and kills and reason not in ("cancelled", "time_limit"):
            asked = self.spec.memory_per_node or "the cluster's default"
            reason = "out_of_memory"
            error = f"{kills} of its processes were killed for want of memory (asked for: {asked} per node); {error}"
        self.record.outcome(exit_code=exit_code, reason=reason, error=error, traceback=traceback)
        ending = "the run is over" if error is None else error
        # Ranks still loading have nothing to put away and would hear the request only when they are done.
        if orderly and self.has_loop and self.record.worker_phase == "ready":
            self._close_worker()
        self.record.worker_status("ended", ending, error=None if exit_code == 0 else error)
        process_tree.end_below(os.getpid(), grace_s=_TERM_GRACE_S)
        return exit_code

    def _close_worker(self) -> None:
        """Ask the ranks to end by themselves, through the log like every request."""
        assert self.agent is not None
        address = read_address(self.run_folder)
        if address is None or not close_worker(address):
            return
        deadline = time.monotonic() + _CLOSE_GRACE_S
        while self.agent.exit_code() is None and time.monotonic() < deadline:
            if any(number != signal.SIGUSR2 for number in self.take_signals()):
                return
            time.sleep(_POLL_S)


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
