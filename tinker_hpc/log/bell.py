"""A hint from gateway to worker and back that there is something new in a log, within milliseconds on one node.

Unix datagram sockets in a folder of ours alone (0700) under the temporary directory, named after the worker folder:

    <temporary directory>/tinker_hpc-<uid>/<hash of the worker folder>.gateway, .worker

The bell carries nothing and promises nothing: whoever waits looks into the log afterwards in any case. Where there is
no bell (other node, other temporary directory, a folder that is not ours) waiting is polling with growing pauses.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

from tinker_hpc.private_files import PRIVATE_DIR

FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 1.0
GROWTH = 1.3
"""Pauses grow by this factor: an answer that took t seconds is noticed at most about 0.3 t later."""
_MAX_PATH = 100  # bytes; the kernel's limit for a socket's path is 108


class Bell:
    """One side's end of the bell. `ring` from any thread; `wait` from one."""

    def __init__(self, worker_folder: Path, *, side: Literal["gateway", "worker"]) -> None:
        """Listen on this side's socket, if we can. Never raises for want of a bell."""
        self._pause_s = FIRST_PAUSE_S
        self._socket: socket.socket | None = None
        self._send_lock = threading.Lock()
        folder = _private_folder()
        if folder is None:
            return
        name = hashlib.sha256(os.fsencode(worker_folder.resolve())).hexdigest()[:24]
        self._own = folder / f"{name}.{side}"
        self._peer = str(folder / f"{name}.{'worker' if side == 'gateway' else 'gateway'}")
        if len(os.fsencode(self._peer)) > _MAX_PATH:
            return
        with contextlib.suppress(OSError):
            own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                self._own.unlink(missing_ok=True)  # of a predecessor that was killed
                own.bind(str(self._own))
                own.setblocking(False)
            except OSError:
                own.close()
                raise
            self._socket = own

    def ring(self) -> None:
        """Tell the other side that there is something new. Never blocks, never raises."""
        self._pause_s = FIRST_PAUSE_S  # an answer may come soon
        if self._socket is not None:
            with self._send_lock, contextlib.suppress(OSError):  # nobody there, or enough rings waiting already
                self._socket.sendto(b"!", self._peer)

    def wake(self) -> None:
        """Ring ourselves: end our own `wait`, from another thread. Never blocks, never raises."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", str(self._own))

    def wait(self, timeout_s: float) -> bool:
        """Wait for a ring, at most `timeout_s` seconds; True if it rang.

        Without a peer on this node it returns False after a pause that grows from 5 ms to 1 s while nothing happens
        (ringing oneself starts it anew), so calling it in a loop around `poll` is right in both cases.
        """
        if self._socket is None:
            time.sleep(min(timeout_s, self._next_pause_s()))
            return False
        if not self._peer_listens():
            timeout_s = min(timeout_s, self._next_pause_s())
        ready, _, _ = select.select([self._socket], [], [], timeout_s)
        if not ready:
            return False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
        self._pause_s = FIRST_PAUSE_S
        return True

    def close(self) -> None:
        """Stop listening."""
        if self._socket is not None:
            self._socket.close()
            self._own.unlink(missing_ok=True)
            self._socket = None

    def _peer_listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._peer)
            except OSError:
                return False
        return True

    def _next_pause_s(self) -> float:
        pause_s = self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, pause_s * GROWTH)
        return pause_s


def _private_folder() -> Path | None:
    """Our folder for sockets, made if need be; None if somebody else made it or could reach into it."""
    folder = Path(tempfile.gettempdir()) / f"tinker_hpc-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=PRIVATE_DIR)
        info = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077
    return folder if private else None
