"""How long ranks that are asked to end may take to put their state away (worker/parting.py), before they are killed.

The time until somebody else kills them is known more or less: Slurm's KillWait after its own SIGTERM, the end that it
gave a preempted job, the time limit. What is left after a reserve for writing down how the job ended is theirs. They
need a moment; the rest is not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from launch import process_tree

LONGEST_S = 25.0
"""torch's agent is told to kill ranks five seconds later than this (children.py)."""
RESERVE_S = 1.5
"""For the note how the attempt ended. Without it the next one looks at our heart for some seconds: no more is lost."""
KILL_WAIT_S = 30.0
"""Slurm's default, from SIGTERM to SIGKILL."""
_POLL_S = 0.05


def patience_s(*, killed_in_s: float | None) -> float:
    """Seconds that the ranks get (pure).

    Args: killed_in_s: until somebody else kills them; None where nobody will.
    """
    left_s = LONGEST_S if killed_in_s is None else killed_in_s - RESERVE_S
    return min(max(left_s, 0.0), LONGEST_S)


def end_below(pid: int, *, parts: Callable[[], bool], patience_s: float, grace_s: float) -> float:
    """End every descendant of a process: TERM, then KILL.

    Args:
        parts: whether the ranks still put their state away; false where there are none.
        patience_s: for them. grace_s: between TERM and KILL for everything else.
    Returns: for how long there was somebody putting state away, in seconds.
    """
    began = time.monotonic()
    parted_s = 0.0
    if patience_s > 0 and parts():
        process_tree.ask_below(pid)
        while parts() and (parted_s := time.monotonic() - began) < patience_s:
            time.sleep(_POLL_S)
    process_tree.end_below(pid, grace_s=max(0.0, grace_s - parted_s))
    return parted_s
