"""When to take a snapshot. Pure.

Young (1974) and Daly (2006): with a mean time between failures M and a cost C per snapshot, tau = sqrt(2 C M) loses the
least. The log makes the interval a question of cost alone: whatever was accepted is redone from it.
"""

from __future__ import annotations

import math

MTBF_S = 6 * 3600.0
"""Between preemptions on a busy cluster; hardware fails far more rarely."""
FIRST_S = 30.0
"""Nothing has been measured before the first one; also the shortest interval."""
LONGEST_S = 1800.0
MAX_SHARE_BLOCKED = 0.01
"""Of the time, that training may stand still for snapshots."""
MAX_SHARE_WRITING = 0.1
"""Of the time, that the filesystem is busy with them."""
EARLY = 0.2
"""So much of the interval earlier a snapshot is taken at a moment at which no model has pending gradients: they are the
costly part, for each rank has its own."""


def interval_s(blocked_s: float | None, write_s: float | None) -> float:
    """Seconds from one snapshot to the next, from what the last one cost (None: none was taken yet)."""
    if blocked_s is None or write_s is None:
        return FIRST_S
    best = max(math.sqrt(2 * blocked_s * MTBF_S), blocked_s / MAX_SHARE_BLOCKED, write_s / MAX_SHARE_WRITING)
    return min(max(best, FIRST_S), LONGEST_S)


def is_due(since_s: float, interval: float, *, changed: bool, pending_gradients: bool, lead_s: float = 0.0) -> bool:
    """Whether to take one now, `since_s` after the last.

    Args: lead_s: from now until one taken at the *next* chance would be on the disk. What a restart redoes is at most
        what happened between two snapshots and until the second is there: that is to be within the interval.
    """
    if not changed:
        return False
    return since_s + min(lead_s, interval / 2) >= interval * (1 if pending_gradients else 1 - EARLY)
