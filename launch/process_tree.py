"""Processes of this machine that we started: is it still the same one, what did it start, end it all.

Only what carries our mark is ever ended: a process id together with its start time, a descendant of one, or a process
whose environment says TINKER_HPC_RUN_ID=<run>. Linux only (/proc).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

RUN_ID_VARIABLE = "TINKER_HPC_RUN_ID"
"""Set in every process of a run; a nested run sets its own."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_RESEND_S = 1.0


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that cannot be confused with a later one of the same id."""

    pid: int
    start: int
    """Clock ticks after boot (field 22 of /proc/PID/stat)."""
    host: str


@dataclass(frozen=True)
class _Stat:
    parent: int
    state: str
    start: int


def this_host() -> str:
    """This machine's name."""
    return socket.gethostname()


def identity(pid: int) -> ProcessIdentity | None:
    """The process that has this id now; None if there is none or it is only waiting to be reaped."""
    stat = _stat(pid)
    return None if stat is None or stat.state in "ZX" else ProcessIdentity(pid, stat.start, this_host())


def is_alive(process: ProcessIdentity) -> bool:
    """Whether that very process runs. False for a zombie and for a recycled id."""
    return identity(process.pid) == process


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents before children, zombies left out."""
    children: dict[int, list[int]] = {}
    for other in _all_pids():
        stat = _stat(other)
        if stat is not None and stat.state not in "ZX":
            children.setdefault(stat.parent, []).append(other)
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def stopped(pids: Iterable[int]) -> list[ProcessIdentity]:
    """Those that a signal has stopped (SIGSTOP, SIGTTIN ...); not those that a debugger holds."""
    found = []
    for pid in pids:
        stat = _stat(pid)
        if stat is not None and stat.state == "T":
            found.append(ProcessIdentity(pid, stat.start, this_host()))
    return found


def kill(process: ProcessIdentity) -> None:
    """SIGKILL to that very process, if it is still there; not to what it started."""
    if is_alive(process):
        _signal([process.pid], signal.SIGKILL)


def of_run(run_id: str) -> list[int]:
    """Processes of this user, on this machine, started for that run."""
    mark = f"{RUN_ID_VARIABLE}={run_id}".encode()
    found = []
    for pid in _all_pids():
        if pid == os.getpid():
            continue
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(pid)
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


def end(process: ProcessIdentity, *, grace_s: float) -> None:
    """TERM the process (repeatedly), and after `grace_s` KILL it and everything below it. Returns when they are gone.

    A process that ends on TERM is trusted to have ended what it started.
    """
    deadline = time.monotonic() + grace_s
    while is_alive(process) and time.monotonic() < deadline:
        _signal([process.pid], signal.SIGTERM)
        _wait_until(lambda: not is_alive(process), min(_RESEND_S, max(0.0, deadline - time.monotonic())))
    if is_alive(process):
        tree = [who for pid in (process.pid, *descendants(process.pid)) if (who := identity(pid)) is not None]
        _signal([who.pid for who in tree], signal.SIGKILL)
        _wait_until(lambda: not any(is_alive(who) for who in tree), 10.0)


def end_run(run_id: str, *, grace_s: float) -> None:
    """End whatever is left of a run on this machine: TERM, then KILL. Returns when nothing is left."""
    _end_all(lambda: of_run(run_id), grace_s)


def ask_below(pid: int) -> None:
    """TERM to every descendant of a process, once. Does not wait."""
    _signal(descendants(pid), signal.SIGTERM)


def end_below(pid: int, *, grace_s: float) -> None:
    """End every descendant of a process: TERM, then KILL."""
    _end_all(lambda: descendants(pid), grace_s)


def adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind, so that `end_below` finds daemons too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def child_setup(death_signal: int = signal.SIGTERM) -> Callable[[], None]:
    """A `preexec_fn` for our children.

    The child gets `death_signal` when we are killed without a chance to end it, and ignores USR2: Slurm without
    cgroups sends its warning to every process of the step, and the default action would be death.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after fork only the call itself is safe
    parent = os.getpid()

    def setup() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if os.getppid() != parent:  # we died between fork and prctl
            os._exit(1)

    return setup


def _end_all(find: Callable[[], list[int]], grace_s: float) -> None:
    for signal_number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        if not (pids := find()):
            return
        _signal(pids, signal_number)
        _wait_until(lambda: not find(), patience_s)


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rsplit(b")", 1)[1].split()  # the name before it may hold spaces and brackets
    except OSError:
        return None
    return _Stat(parent=int(words[1]), state=words[0].decode(), start=int(words[19]))
