"""A worker that is asked to end (SIGTERM) puts its state away first, so that its successor redoes nothing.

Slurm sends SIGTERM to every process of a job that it will kill some seconds later, and a supervisor does so before it
hands over. Rank 0 then answers what is being computed, takes no more work, and orders a last snapshot; when that is on
the disk all ranks end, by the signal. Nothing depends on it: a kill on the way leaves half a snapshot, which is passed
over, and the log is redone from the one before.

SIGTERM also comes from torch's agent, to ranks whose peer has died. They cannot do anything together any more, and end
at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_LOOK_AT_PEERS_S = 0.2


class Parted(BaseException):
    """Ends this rank: its state is on the disk. No failure of a request, so `except Exception` lets it pass."""


class Parting:
    """Whether this rank was asked to end. Made by the process's main thread, once."""

    def __init__(self) -> None:
        self.asked = False
        self._armed = False
        self._wake: Callable[[], None] = lambda: None

    def arm(self, wake: Callable[[], None] | None) -> None:
        """From now on SIGTERM only asks. Until then it ends the rank: there is nothing to put away.

        Args: wake: called on SIGTERM, from another thread: ends rank 0's wait for work.
        """
        if wake is not None:
            self._wake = wake
        if self._armed:
            return
        self._armed = True
        peers = _peers()
        ours, pythons = socket.socketpair()
        pythons.setblocking(False)
        # The byte is written by the signal itself: a main thread inside a collective runs no Python handler.
        signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._watch, args=(ours, pythons, peers), name="parting", daemon=True).start()

    def _watch(self, ours: socket.socket, pythons: socket.socket, peers: dict[int, str]) -> None:
        while signal.SIGTERM not in ours.recv(64):
            pass
        self.asked = True
        self._wake()
        while all(_start_of(pid) == start for pid, start in peers.items()):
            time.sleep(_LOOK_AT_PEERS_S)
        os.kill(os.getpid(), signal.SIGKILL)


def leave() -> NoReturn:
    """End by SIGTERM, as the agent expects of a rank that was sent it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("SIGTERM came back")


def end(code: int) -> NoReturn:
    """End without Python's own end: there, a thread of a process group that lets go of a tensor asks for the
    interpreter, gets none, and the process ends by SIGABRT ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _peers() -> dict[int, str]:
    """The other ranks on this node, by process id, with their start time: same parent, same command line."""
    parent, own = os.getppid(), _read(os.getpid(), "cmdline")
    others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    mine = [pid for pid in others if _stat(pid)[1:2] == [str(parent)] and _read(pid, "cmdline") == own]
    return {pid: start for pid in mine if (start := _start_of(pid))}


def _start_of(pid: int) -> str:
    """When a process started, in clock ticks after boot; "" if it is gone, ended or stopped."""
    stat = _stat(pid)
    return stat[19] if stat and stat[0] not in "ZXTt" else ""


def _stat(pid: int) -> list[str]:
    """State, parent, ... start time (fields 3 to 22 of /proc/PID/stat); [] if there is no such process."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
