"""Making the gradients of an adapter whole: sums over the ranks of a stage, and their global norm.

Rules (see lora_linear.py and experts.py for why). Losses are sums, so every gradient is a sum over all data:
  replicated (column A, row B, lm_head's A; of experts the shared factor): each rank has the part of its own tokens,
      so the sum is over TP and over DP, that is over all ranks of the stage.
  split over TP: complete for the tokens of its copy of the model; a sum over DP.
  split over EP: complete for the tokens that reached its expert; a sum over the copies of the expert.
Nothing is communicated before the optimizer step, however many passes accumulate.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from .adapters import Adapter
from .runtime import Runtime


def sum_gradients(adapter: Adapter, runtime: Runtime, grads: torch.Tensor | None = None) -> None:
    """Complete adapter.grads, or a copy of them, in place.

    Collectives: all-reduce of the replicated part over the TP group; of that and what TP splits over the DP group; of
        what EP splits over the group of its copies. A part that is empty (the same on all ranks) is left out.
    """
    layout, grads = runtime.layout, adapter.grads if grads is None else grads
    if layout.tp_size > 1:
        _sum(grads[adapter.replicated], runtime.tp_group)
    if layout.dp_size > 1:
        _sum(grads[: adapter.over_tp.stop], runtime.dp_group)
    if layout.expert_copies > 1:
        _sum(grads[adapter.over_ep], runtime.expert_copies_group)


def _sum(part: torch.Tensor, group: dist.ProcessGroup) -> None:
    if part.numel():
        dist.all_reduce(part, group=group)


def keep_one_share(adapter: Adapter, runtime: Runtime) -> None:
    """The way back from a whole gradient on every rank to shares whose sum it is: the first rank of each sum has it
    all, the others zero. No communication.
    """
    place, grads = runtime.place, adapter.grads
    if place.tp_rank != 0 or place.dp_rank != 0:
        grads[adapter.replicated].zero_()
    if place.dp_rank != 0:
        grads[adapter.over_tp].zero_()
    if place.expert_copy != 0:
        grads[adapter.over_ep].zero_()


def gradient_norm(adapter: Adapter, runtime: Runtime) -> float:
    """Euclidean norm of the whole gradient, replicated matrices counted once; equal on every rank.

    Collectives: one all-reduce of a scalar over the TP, EP and pipeline groups each.
    """
    parts = (adapter.replicated, adapter.over_tp, adapter.over_ep)
    squares = torch.stack([torch.linalg.vector_norm(adapter.grads[x], dtype=torch.float64) ** 2 for x in parts])
    if runtime.layout.tp_size > 1:
        dist.all_reduce(squares[1:2], group=runtime.tp_group)
    if runtime.layout.ep_size > 1:
        dist.all_reduce(squares[2:3], group=runtime.ep_group)
    total = squares.sum()
    if runtime.layout.pp_size > 1:
        dist.all_reduce(total, group=runtime.forward_group)
    return math.sqrt(total.item())
