"""The seeds that a client leaves to the server: drawn from the run's own seed and from what is asked of whom (pure).

Not from chance: a loop that is killed and goes on from a checkpoint of its own (tinker-cookbook's recipes do) asks its
last steps again. With other draws it would end elsewhere than it would have ended unharmed, and nobody could tell what
the kill has cost. So a seed depends on nothing that such a start changes: not on ids with chance in them, not on how
many requests the loop needed to get there, but on *which model, how many optimizer steps old, which of its samplers at
that age, which of that sampler's requests*. Two requests of one run never share that, unless one was taken back.

Where a run's seed comes from: run_folder.seed_of_run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any


def drawn(run_seed: int, label: str) -> int:
    """63 bits for what is asked under that label: SHA-256 as the generator."""
    digest = hashlib.sha256(f"{run_seed}/{label}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def without_chance(text: str, sessions: Iterable[tuple[str, int]]) -> str:
    """A model id or tinker:// path with the ids of sessions, which are random, replaced by their numbers."""
    for session_id, number in sessions:
        text = text.replace(session_id, f"#{number}")
    return text


class Age:
    """How many optimizer steps a model has taken, and how many samplers it was given since: built from its requests.

    A model made from a state, or that loads one, is as old as that.

    Args: text: as `str` gives it, "<steps>.<samplers>".
    """

    def __init__(self, text: str = "0.0") -> None:
        self._steps, self._samplers = map(int, text.split("."))

    def __str__(self) -> str:
        return f"{self._steps}.{self._samplers}"

    def note(self, header: Mapping[str, Any]) -> str | None:
        """Take in the model's next request. Returns: of a sampling snapshot, what tells it from the model's others."""
        if header["op"] == "optim_step":
            self._steps, self._samplers = self._steps + 1, 0
        elif header["op"] == "load_state":
            self._steps, self._samplers = map(int, (header.get("age") or "0.0").split("."))
        elif header["op"] == "save_sampler_weights" and header.get("sampling_session_id"):
            label = str(self)
            self._samplers += 1
            return label
        return None
