"""Processes that stand still: stopped by a signal (SIGSTOP), they neither work nor end, and everybody waits for them.

The ranks that wait in a collective end in the end (tinker_hpc/worker/hang.py), but an idle worker, a worker of one
rank, or a stopped agent would wait for ever. So the supervisor looks, and kills what stood still for a while; what
follows is what follows after any kill.

Slurm suspends a job by stopping all of it, this supervisor too. So time counts only while the supervisor itself runs.
"""

from __future__ import annotations

from collections.abc import Collection

from launch.process_tree import ProcessIdentity

STOPPED_S = 20.0
"""Long enough that `scontrol suspend` and `resume`, which signal one process after the other, are over."""
LOOK_EVERY_S = 2.0


class StoppedWatch:
    """Counts for how long processes have been found stopped (pure: told what is stopped, and when)."""

    def __init__(self, patience_s: float = STOPPED_S) -> None:
        self._patience_s = patience_s
        self._looked_at: float | None = None
        self._stood: dict[ProcessIdentity, float] = {}

    def look(self, stopped: Collection[ProcessIdentity], now: float) -> list[ProcessIdentity]:
        """Those of `stopped` that have been so for too long. `now`: seconds of a monotonic clock."""
        elapsed = 0.0 if self._looked_at is None else min(now - self._looked_at, 2 * LOOK_EVERY_S)
        self._looked_at = now
        self._stood = {who: self._stood.get(who, -elapsed) + elapsed for who in stopped}
        return [who for who, stood_s in self._stood.items() if stood_s >= self._patience_s]
