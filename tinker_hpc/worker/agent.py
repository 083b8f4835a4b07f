"""Which of torch's elastic agents started this rank, and whether its time is over.

An agent restarts its ranks when one ends. Where another worker has taken the lease over from this agent, that must not
lead to taking it back: the two would throw each other out for ever.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from tinker_hpc.errors import LeaseLostError


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
