"""One node of a job: which one, its signals, its ranks. And the nodes that have nothing but ranks."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch import memory_kills, parting, process_tree
from launch.children import Child, agent_argv, agent_environment
from launch.job_spec import JobSpec
from launch.log_tail import were_killed, worker_words
from launch.own_address import gloo_environment, own_address
from launch.run_record import listed
from launch.slurm_fields import node_names
from launch.stopped import LOOK_EVERY_S, StoppedWatch
from tinker_hpc.patience import until_written
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder

POLL_S = 0.1
LISTING_POLL_S = 1.0
"""How often the shared filesystem is asked for files of other nodes."""
CLOSE_GRACE_S = 30.0
"""How long the ranks get to end by themselves after the close request."""
_RENDEZVOUS_PATIENCE_S = 600.0
"""Nodes of one job may start minutes apart on a busy cluster (prolog scripts, image caches)."""


@dataclass(frozen=True)
class Place:
    """Which node of which job this process is on."""

    job_id: str
    node_rank: int
    hostname: str
    executor: str
    start: str = ""
    """Which start of the job this is: a requeued job has its id again, and its other nodes must not take the meeting
    point of the time before for theirs."""
    other_nodes: tuple[str, ...] = ()
    """Slurm's names of the job's other nodes."""

    @classmethod
    def here(cls) -> Place:
        """Read from the environment that srun or submitit's local controller made."""
        executor = os.environ.get("SUBMITIT_EXECUTOR", "local")
        slurm = executor == "slurm"
        job_id = os.environ["SLURM_JOB_ID" if slurm else "SUBMITIT_LOCAL_JOB_ID"]
        node_rank = int(os.environ.get("SLURM_NODEID", "0")) if slurm else 0
        nodes = node_names(os.environ.get("SLURM_JOB_NODELIST", "")) if slurm else ()
        return cls(
            job_id=job_id,
            node_rank=node_rank,
            hostname=socket.gethostname(),
            executor=executor,
            start=f"{job_id}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
            other_nodes=nodes[:node_rank] + nodes[node_rank + 1 :],
        )

    def say(self, text: str) -> None:
        """A line in the log of the node it is on."""
        print(f"tinker_hpc {time.strftime('%H:%M:%S')} {self.hostname}: {text}", flush=True)


class Node:
    """What both kinds of node share: signals, the agent, the log."""

    def __init__(self, spec: JobSpec, run_folder: RunFolder, place: Place) -> None:
        self.spec = spec
        self.run_folder = run_folder
        self.place = place
        self.started_at = time.time()
        self.agent: Child | None = None
        self._kills_before = memory_kills.count()  # a local job shares its cgroup with others
        self._signals: list[int] = []
        self._stopped_watch = StoppedWatch()
        self._next_look_for_stopped = 0.0
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
        env = agent_environment(self.spec, os.environ, cores=len(os.sched_getaffinity(0)))
        called = "localhost"
        if self.spec.nodes > 1:
            called = self.place.hostname
            address = own_address(called, self.place.other_nodes)
            env = {**gloo_environment(called, address), **env}
            if self.place.node_rank == 0 and address is not None:
                # torch gives rank 0 to the address that sorts first. A number sorts before a name, so the first node
                # says its IP address: rank 0, which hears the gateway's bell, is then on the gateway's node.
                called = address
        argv = agent_argv(
            self.spec,
            self.run_folder,
            node_rank=self.place.node_rank,
            own_address=called,
            endpoint=endpoint,
        )
        self.agent = Child("worker", argv, env, self.run_folder.logs / f"worker-{self.place.node_rank}.log")
        return self.agent

    def end_stopped(self) -> int:
        """Kill the agent or ranks of it that stand still, so that they are started again. Returns how many."""
        now = time.monotonic()
        if self.agent is None or now < self._next_look_for_stopped:
            return 0
        self._next_look_for_stopped = now + LOOK_EVERY_S
        pids = [self.agent.pid, *process_tree.descendants(self.agent.pid)]
        hung = self._stopped_watch.look(process_tree.stopped(pids), now)
        for who in hung:
            kind = "the agent of the ranks" if who.pid == self.agent.pid else "a rank"
            self.say(f"{kind} (pid {who.pid}) was stopped by a signal and stood still; killed, to be started again")
            process_tree.kill(who)
        return len(hung)

    def agent_failure(self, exit_code: int) -> str:
        """Why the agent gave up: the rank's own error, else the log's last lines."""
        assert self.agent is not None
        said = worker_words(self.agent.log_text()).rstrip(".")
        return f"the worker ended on {self.place.hostname} with exit code {exit_code}: {said}. Log: {self.agent.log}"

    def memory_kills(self) -> int:
        """How many processes of this job the kernel has killed on this node for want of memory."""
        return memory_kills.count() - self._kills_before

    def say(self, text: str) -> None:
        """A line in this node's own log."""
        self.place.say(text)

    def failure_file(self, node_rank: int, number: int) -> Path:
        """Where a node without a gateway reports that its agent ended in that round."""
        return self.run_folder.slurm / f"node-{node_rank}-failed-{self.place.start}-{number}.json"


class OtherNode(Node):
    """Every node but the first: ranks only. What happens to them is told to the first node by a file."""

    def run(self) -> int:
        rendezvous = self._rendezvous()
        if rendezvous is None:
            return 1
        next_listing = 0.0
        deadline: float | None = None
        while rendezvous is not None:
            agent = self.start_agent((rendezvous["host"], rendezvous["port"]))
            reported, following = False, None
            while following is None:
                if self.take_signals_to_stop():
                    self._end_ranks(agent)
                    return 1
                self.end_stopped()
                code = agent.exit_code()
                if code == 0:
                    return 0
                if code is not None and not reported:
                    # Not an exit of ours: srun would kill the first node before the loop heard why.
                    self._report(code, rendezvous["round"])
                    reported = True
                if time.monotonic() >= next_listing:
                    next_listing = time.monotonic() + LISTING_POLL_S
                    if deadline is None and listed(self.run_folder.outcome):
                        deadline = time.monotonic() + (0 if reported else CLOSE_GRACE_S)
                    following = self._meeting_after(rendezvous)
                if deadline is not None and time.monotonic() >= deadline:
                    return 0
                time.sleep(POLL_S)
            agent.kill()
            rendezvous = following
        return 1

    @staticmethod
    def _end_ranks(agent: Child) -> None:
        """The ranks of all nodes put their state away together; Slurm's KILL, or this, ends those that cannot."""

        def parts() -> bool:
            return agent.exit_code() is None

        parting.end_below(os.getpid(), parts=parts, patience_s=parting.LONGEST_S, grace_s=0.0)

    def _report(self, code: int, number: int) -> None:
        why = self.agent_failure(code)
        assert self.agent is not None
        kills = self.memory_kills()
        killed = code > 128 or (were_killed(self.agent.log_text()) and not kills)
        failure = {"error": why, "memory_kills": kills, "killed": killed}
        until_written(lambda: write_json(self.failure_file(self.place.node_rank, number), failure))
        self.say(why)

    def take_signals_to_stop(self) -> bool:
        """Whether a signal asks for the end (USR2 only announces it)."""
        return any(number in (signal.SIGTERM, signal.SIGINT) for number in self.take_signals())

    def _rendezvous(self) -> dict[str, Any] | None:
        """The first meeting point of this start of the job."""
        deadline = time.monotonic() + _RENDEZVOUS_PATIENCE_S
        while (found := self._meeting_after(None)) is None:
            if self.take_signals_to_stop():
                return None
            if time.monotonic() > deadline:
                path = self.run_folder.worker(0).rendezvous
                self.say(f"no {path} after {_RENDEZVOUS_PATIENCE_S:.0f} s: did the first node start?")
                return None
            time.sleep(POLL_S)
        return found

    def _meeting_after(self, known: dict[str, Any] | None) -> dict[str, Any] | None:
        """The meeting point of this start of the job, if it is another one than `known`."""
        path = self.run_folder.worker(0).rendezvous
        if not listed(path):
            return None
        found = read_json(path)
        return found if found and found.get("start") == self.place.start and found != known else None
