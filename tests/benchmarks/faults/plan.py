"""What the monkey does to a run, from a seed (pure): the same seed gives the same strikes in the same order.

The moments are not the seed's alone: a strike waits for the run to get on, or does not, and then for a random while.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# What is struck, how, and how often relative to the others.
WEIGHTS: dict[tuple[str, str], float] = {
    ("rank", "KILL"): 4.0,
    ("agent", "KILL"): 3.0,
    ("gateway", "KILL"): 4.0,
    ("loop", "KILL"): 4.0,
    ("supervisor", "KILL"): 2.0,
    ("job", "TERM"): 2.0,
    ("job", "KILL"): 2.0,
    ("rank", "STOP"): 1.0,
    ("gateway", "STOP"): 1.0,
    ("loop", "STOP"): 1.0,
    ("supervisor", "STOP"): 1.0,
    ("slurmd", "KILL"): 1.0,
    ("slurmctld", "KILL"): 1.0,
    ("disk", "ENOSPC"): 1.5,
}
MAX_IN_VAIN = 1
"""Strikes in a row that do not wait for the run to get on. The rule (launch/chain.py) ends a run after three jobs
without a new answer, as it should; the monkey is not there to prove that."""


@dataclass(frozen=True)
class Strike:
    """One blow."""

    what: str
    how: str
    waits_for_progress: bool
    """Whether the run first gets on with its work after the strike before."""
    delay_s: float
    """Then so long."""
    lasts_s: float
    """STOP and ENOSPC: until CONT, until there is room again; slurmd, slurmctld: until they are started again."""


def strikes(seed: int, count: int) -> list[Strike]:
    """The strikes of one run."""
    rng = random.Random(seed)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    planned: list[Strike] = []
    in_vain = 0
    for _ in range(count):
        what, how = rng.choices(kinds, weights)[0]
        waits = rng.random() < 0.75 or in_vain >= MAX_IN_VAIN or not planned
        in_vain = 0 if waits else in_vain + 1
        planned.append(Strike(what, how, waits, round(rng.uniform(0.0, 2.5), 3), round(rng.uniform(1.0, 4.0), 3)))
    return planned
