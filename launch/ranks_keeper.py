"""The ranks of a job, kept going from the first node: ready or not, started again in rounds, gone for good.

A dead rank is torch's elastic agent's affair: it starts all ranks again in place. What the agent cannot do is start
itself again. So when an agent was killed, here or on another node, or gave up although its ranks had brought the run
forward, a new *round* begins: a new meeting point in rendezvous.json, at which every node starts a new agent.
"""

from __future__ import annotations

import random
import socket
import time
from typing import Any

from launch import progress
from launch.log_tail import disk_refused, num_failed_starts, were_killed
from launch.node import LISTING_POLL_S, POLL_S, Node
from launch.run_record import RunRecord, listed
from tinker_hpc.patience import until_there_is_room, until_written
from tinker_hpc.private_files import read_json, write_json

_EARLY_STARTS = 2
"""Ranks that fail before they are ready get one more chance (a port taken, a filesystem that lags), not three."""
_MAX_KILLS_IN_VAIN = 3
"""Agents killed one after the other without a new answer in between: whoever kills them will go on."""
_SIGNALLED = 128


def may_start_again(*, killed: bool, progressed: bool, num_in_vain: int) -> bool:
    """Whether a new round is worth it after an agent ended (pure).

    Args:
        killed: by a signal from outside; else the agent gave up on ranks that failed.
        progressed: its ranks published a new answer.
        num_in_vain: rounds in a row that did not, this one included.
    """
    return progressed or (killed and num_in_vain < _MAX_KILLS_IN_VAIN)


class RanksKeeper:
    """Starts the rounds and watches them. `step` is called again and again.

    Args:
        node: the first node: it starts the agent.
        attempt: this job's attempt; other nodes tell it from the one before by the job's own mark.
    """

    def __init__(self, node: Node, record: RunRecord, *, attempt: int, has_loop: bool) -> None:
        self._node = node
        self._spec = node.spec
        self._run_folder = node.run_folder
        self._record = record
        self._attempt = attempt
        self._has_loop = has_loop
        self._round = 0
        self._since: dict[str, Any] = {}
        self._num_in_vain = 0
        self._next_listing = 0.0
        self.kills_elsewhere = 0
        """Processes of other nodes that were killed for want of memory."""
        self.error: str | None = None
        """Why there will be no ranks any more; None while there are."""

    def start(self) -> None:
        """Begin the first round."""
        self._record.worker_status("starting", f"loading {self._spec.base_model} on {self._spec.world_size} ranks")
        self._begin_round()

    def step(self) -> None:
        """Follow the ranks: `ready` once they say so, a new round or `ended` when an agent ended."""
        agent = self._node.agent
        assert agent is not None
        if self.error is not None:
            return
        code = agent.exit_code()
        if code is not None and code != 0:
            killed = code > _SIGNALLED or (were_killed(agent.log_text()) and not self._node.memory_kills())
            self._agent_ended(self._node.agent_failure(code), killed=killed)
            return
        if code == 0 and self._has_loop:
            self._gone("the worker ended by itself, without a close request from this run")
        if time.monotonic() < self._next_listing:
            return
        num_failed = num_failed_starts(agent.log_text()) + self._node.memory_kills()
        if self._record.worker_phase == "starting" and num_failed >= _EARLY_STARTS:
            # Ranks that were never ready have nothing to resume, and loading a large model takes minutes each time.
            why = self._node.agent_failure(1)
            agent.kill()
            if disk_refused(agent.log_text()):
                until_there_is_room(self._run_folder.logs)
                self._agent_ended(why, killed=True)
            else:
                self._gone(why)
            return
        self._next_listing = time.monotonic() + (LISTING_POLL_S if self._record.worker_phase == "ready" else POLL_S)
        for node_rank in range(1, self._spec.nodes):
            if listed(path := self._node.failure_file(node_rank, self._round)):
                failure = read_json(path) or {}
                self.kills_elsewhere += int(failure.get("memory_kills", 0))
                self._agent_ended(str(failure.get("error")), killed=bool(failure.get("killed")))
                return
        if self._record.worker_phase == "starting" and progress.is_ready(self._run_folder, self._since):
            self._record.worker_status("ready", "")
            self._record.event("worker_ready", round=self._round)

    def _agent_ended(self, why: str, *, killed: bool) -> None:
        progressed = progress.made(self._run_folder, self._since, {}, credit="answers")
        self._num_in_vain = 0 if progressed else self._num_in_vain + 1
        if not may_start_again(killed=killed, progressed=progressed, num_in_vain=self._num_in_vain):
            self._gone(why)
            return
        self._record.event("worker_restarted", error=why, round=self._round)
        self._node.say(f"the ranks are started again: {why}")
        self._record.worker_status("starting", "the ranks are started again")
        assert self._node.agent is not None
        self._node.agent.kill()
        self._begin_round()

    def _begin_round(self) -> None:
        """A meeting point for the agents of all nodes, published, and this node's own."""
        self._round += 1
        self._since = progress.marks(self._run_folder)
        endpoint = None
        if self._spec.nodes > 1:
            endpoint = (self._node.place.hostname, _free_port())
            meeting = {
                "host": endpoint[0],
                "port": endpoint[1],
                "start": self._node.place.start,
                "attempt": self._attempt,
                "round": self._round,
            }
            until_written(lambda: write_json(self._run_folder.worker(0).rendezvous, meeting))
        until_written(lambda: self._node.start_agent(endpoint))

    def _gone(self, why: str) -> None:
        """From here on the gateway answers every open future with this error."""
        self.error = why
        self._record.worker_status("ended", "the worker failed", error=why)
        self._record.event("worker_ended", error=why)
        self._node.say(why)


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
