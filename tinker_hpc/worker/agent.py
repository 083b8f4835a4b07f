"""Which of torch's elastic agents started this rank, whether its time is over, and not outliving it.

An agent restarts its ranks when one ends. Where another worker has taken the lease over from this agent, that must not
lead to taking it back: the two would throw each other out for ever.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tinker_hpc.errors import LeaseLostError

_LOOK_AT_AGENT_S = 1.0


def end_with_agent() -> None:
    """From now on this rank ends at once when its agent does, by SIGKILL too.

    Nobody restarts or stops the ranks of a dead agent: they would wait for each other, and hold their GPUs, for ever.
    A kill costs nothing, see redo.py. (The kernel's own death signal will not do: it comes when the *thread* that
    started us ends.)
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_AT_AGENT_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-agent", daemon=True).start()


def owner() -> dict[str, Any]:
    """Who takes the lease: host, pid and the agent (this process's parent), told apart from one that reuses its pid."""
    parent = os.getppid()
    host = socket.gethostname()
    return {"host": host, "pid": os.getpid(), "agent": f"{host}:{parent}:{_start_time(parent)}"}


def refuse_if_superseded(lease_folder: Path, agent: str) -> None:
    """Raises: LeaseLostError if this agent held the lease before and another agent has it now."""
    owners = []
    for path in sorted(lease_folder.glob("fence-*")):
        owners.append(json.loads(path.read_bytes()))
    if owners and owners[-1].get("agent") != agent and any(o.get("agent") == agent for o in owners):
        newest = owners[-1]
        raise LeaseLostError(
            f"the worker of {lease_folder.parent} was taken over by pid {newest.get('pid')} on {newest.get('host')}; "
            "this one is not started again. Nothing to do."
        )


def _start_time(pid: int) -> str:
    """Clock ticks after boot at which the process started (field 22 of /proc/<pid>/stat)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "?"
