"""What the supervisor on the first node leaves in the run folder: events, worker status, outcome.

    events.jsonl           {"time", "event", ...} a line: claimed, successor, started, gateway_ready, loop_started,
                           worker_ready, worker_restarted, worker_ended, gateway_hung, gateway_restarted, signal,
                           loop_ended, loop_restarted, handed_over, superseded, ended
    workers/0/status.json  {"phase": queued | starting | ready | ended, "reason", "error", "since"}      (runs only)
    outcome.json           {"state": succeeded | failed, "reason", "exit_code", "error", "traceback", "ended_at"}

`reason` of an outcome says who ended it: `loop` (by itself, well or not), `cancelled`, `time_limit`, `preempted`,
`signal` (sent by nobody knows whom), `out_of_memory` (it failed, and the kernel had killed processes of the job),
`worker`, `gateway`, `setup` (the loop could not be started), `closed` (a session, or the run a worker was for),
`run_gone` (a worker's run died without a word).

A disk that is full for a moment must not end a training run: events and status that cannot be written are said in the
job's log instead, and the outcome is tried again for a while.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder


class RunRecord:
    """Writes the supervisor's files. One instance, on the first node."""

    def __init__(self, run_folder: RunFolder, *, writes_status: bool) -> None:
        self._run_folder = run_folder
        self._writes_status = writes_status
        self._phase = ""
        self._since = 0.0

    def event(self, event: str, **details: Any) -> None:
        """Append one line to `events.jsonl`, durable on return."""
        line = json.dumps({"time": time.time(), "event": event, **details}) + "\n"
        try:
            descriptor = os.open(self._run_folder.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            print(f"tinker_hpc: cannot write {self._run_folder.events} ({error}): {line}", flush=True)

    def worker_status(self, phase: str, reason: str, *, error: str | None = None) -> None:
        """Tell the gateway how the worker is. A session's status is written by the client's monitor instead."""
        if self._phase == "ended":
            return
        if phase != self._phase:
            self._phase, self._since = phase, time.time()
        if self._writes_status:
            value = {"phase": phase, "reason": reason, "error": error, "since": self._since}
            try:
                write_json(self._run_folder.worker(0).status, value)
            except OSError as trouble:
                print(f"tinker_hpc: {trouble} It would have said: {value}", flush=True)

    @property
    def worker_phase(self) -> str:
        """The phase last written; "" before the first."""
        return self._phase

    def outcome(self, *, exit_code: int, reason: str, error: str | None = None, traceback: str | None = None) -> None:
        """How it ended; written once, before anything is torn down, so that a result never waits for a shutdown."""
        value = {
            "state": "succeeded" if exit_code == 0 else "failed",
            "reason": reason,
            "exit_code": exit_code,
            "error": error,
            "traceback": traceback,
            "ended_at": time.time(),
        }
        for wait_s in (0.5, 2.0, 5.0, 10.0, 30.0, 0.0):
            try:
                write_json(self._run_folder.outcome, value)
                break
            except OSError as trouble:
                print(f"tinker_hpc: {trouble} It would have said: {value}", flush=True)
                time.sleep(wait_s)
        self.event("ended", reason=reason, exit_code=exit_code, error=error)


def listed(path: Path) -> bool:
    """Whether a file that another node makes is there, asked so that NFS answers truly.

    A stat of a missing name is remembered as missing for up to a minute; a fresh listing is not.
    """
    try:
        return path.name in os.listdir(path.parent)
    except FileNotFoundError:
        return False
