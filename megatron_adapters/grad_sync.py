"""Making the gradients of an adapter whole: sums over tensor- and data-parallel ranks, and their global norm.

Rules (see lora_linear.py for why): a replicated matrix (column A, row B, lm_head's A) holds a partial sum over TP; a
sharded one is complete on its rank. Everything is a sum over DP, because losses are sums. Nothing is communicated
before the optimizer step, however many passes accumulate.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from .adapters import Adapter
from .runtime import Runtime


def sum_gradients(adapter: Adapter, runtime: Runtime, grads: torch.Tensor | None = None) -> None:
    """Complete adapter.grads, or a copy of them, in place.

    Collectives: all-reduce of the replicated part over the TP group, then of everything over the DP group.
    """
    grads = adapter.grads if grads is None else grads
    if runtime.layout.tp_size > 1:
        dist.all_reduce(grads[: adapter.num_replicated], group=runtime.tp_group)
    if runtime.layout.dp_size > 1:
        dist.all_reduce(grads, group=runtime.dp_group)


def keep_one_share(adapter: Adapter, runtime: Runtime) -> None:
    """The way back from a whole gradient on every rank to shares whose sum it is: the first rank of each sum has it
    all, the others zero. No communication.
    """
    if runtime.dp_rank != 0:
        adapter.grads.zero_()
    elif runtime.tp_rank != 0:
        adapter.grads[: adapter.num_replicated].zero_()


def gradient_norm(adapter: Adapter, runtime: Runtime) -> float:
    """Euclidean norm of the whole gradient, replicated matrices counted once; equal on every rank.

    Collectives: one all-reduce of a scalar over the TP group.
    """
    replicated = adapter.grads[: adapter.num_replicated]
    sharded = adapter.grads[adapter.num_replicated :]
    squares = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) ** 2 for x in (replicated, sharded)])
    if runtime.layout.tp_size > 1:
        dist.all_reduce(squares[1:], group=runtime.tp_group)
    return math.sqrt(squares.sum().item())
