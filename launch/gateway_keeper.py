"""The gateway of a run, kept alive: a dead one is started again, a hung one is killed first.

It takes its port and key from gateway.json again and everything else from the logs, so the loop sees only a pause.
"""

from __future__ import annotations

import os
import signal
import time

from launch.children import Child, gateway_argv, gateway_environment
from launch.gateway_client import GatewayAddress, answers, read_address
from launch.job_spec import JobSpec
from launch.log_tail import error_line, last_lines
from launch.run_record import RunRecord
from tinker_hpc.patience import until_there_is_room, until_written
from tinker_hpc.run_folder import RunFolder

_MAX_STARTS_PER_MINUTE = 5
_EARLY_STARTS = 2
"""A gateway that fails before the loop is there gets one more chance: the disk may have been full for a moment."""
_KILLED = (128 + signal.SIGKILL, 128 + signal.SIGTERM)
_PROBE_EVERY_S = 15.0
_START_PATIENCE_S = 60.0
"""From its start to its first answer: imports from a cold shared filesystem take their time."""
_HUNG_AFTER_S = 60.0
"""Without an answer for so long, it never will. Long: a node that swaps, or a filesystem that hangs, is no reason."""


class GatewayKeeper:
    """Starts the gateway and looks after it. `step` is called again and again."""

    def __init__(self, spec: JobSpec, run_folder: RunFolder, record: RunRecord) -> None:
        self._spec = spec
        self._run_folder = run_folder
        self._record = record
        self._child: Child | None = None
        self._starts: list[float] = []
        self._answered_at = 0.0
        self._next_probe = 0.0

    def start(self) -> None:
        """Start the process."""
        now = time.monotonic()
        self._starts.append(now)
        self._answered_at, self._next_probe = now, now + _PROBE_EVERY_S
        argv, env = gateway_argv(self._run_folder), gateway_environment(self._spec, os.environ)
        self._child = until_written(lambda: Child("gateway", argv, env, self._run_folder.logs / "gateway.log"))

    def address(self) -> GatewayAddress | None:
        """Where the process started last listens; None until it answers."""
        assert self._child is not None
        address = read_address(self._run_folder)
        return address if address and address.pid == self._child.pid and answers(address) else None

    def step(self, *, in_use: bool) -> str | None:
        """Look after it once.

        Args:
            in_use: whether the loop runs already. A gateway that fails before that will not get better.
        Returns: why it is hopeless, or None.
        """
        assert self._child is not None
        code = self._child.exit_code()
        if code is None:
            return self._probe(self._child, in_use=in_use)
        text = self._child.log_text()
        said = (error_line(text) or last_lines(text, 3)).rstrip(".") or f"exit code {code}"
        if not in_use and code not in _KILLED and len(self._starts) >= _EARLY_STARTS:
            return f"the gateway could not start: {said}. Log: {self._child.log}"
        recent = [at for at in self._starts if time.monotonic() - at < 60]
        if len(recent) > _MAX_STARTS_PER_MINUTE:
            return f"the gateway ended {len(recent)} times within a minute: {said}. Log: {self._child.log}"
        self._record.event("gateway_restarted", exit_code=code, error=said)
        until_there_is_room(self._run_folder.logs)  # on a full disk it cannot even say what is wrong
        self.start()
        return None

    def _probe(self, child: Child, *, in_use: bool) -> str | None:
        """Kill a gateway that has not answered for too long."""
        now = time.monotonic()
        if in_use and now >= self._next_probe:
            self._next_probe = now + _PROBE_EVERY_S
            if self.address() is not None:
                self._answered_at = now
        if now - self._answered_at < (_HUNG_AFTER_S if in_use else _START_PATIENCE_S):
            return None
        if not in_use:
            return f"the gateway did not answer within {_START_PATIENCE_S:.0f} s of its start. Log: {child.log}"
        self._record.event("gateway_hung", silent_s=round(now - self._answered_at))
        child.kill()
        return None
