"""How much of a rank's memory sampling snapshots may take; beyond it those used longest ago leave.

One of rank 32 for Qwen3-30B-A3B is 1 GiB, and a loop that samples from its newest weights makes one every step. Where
they go is the worker's affair (tinker_hpc/worker/aside.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .adapters import LoraWeights
from .free_memory import free_memory

SHARE = 0.05
"""Of the memory free to this rank when the first one has been made. launch/memory_model.py plans with the same."""


def memory_for_snapshots(device: torch.device) -> int:
    """Bytes of snapshots that this rank may hold."""
    return int(SHARE * free_memory(device))


def num_in_excess(snapshots: Mapping[str, LoraWeights], oldest_first: Sequence[str], most_bytes: int) -> int:
    """How many of `oldest_first`, from the first, would have to go for `snapshots` to fit; at most all of them."""
    held = sum(weights.num_bytes for weights in snapshots.values())
    for number, snapshot_id in enumerate(oldest_first):
        if held <= most_bytes:
            return number
        held -= snapshots[snapshot_id].num_bytes
    return len(oldest_first)
