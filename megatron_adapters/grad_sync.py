"""Making the gradients of an adapter whole: sums over the ranks of a stage, and their global norm.

Rules (see lora_linear.py and experts.py for why). Losses are sums, so every gradient is a sum over all data:
  replicated (column A, row B, lm_head's A; of experts the shared factor): each rank has the part of its own tokens,
      so the sum is over TP and over DP, that is over all ranks of the stage.
  split over TP: complete for the tokens of its copy of the model; a sum over DP.
  of key-value heads that several TP ranks hold: each rank has the part of its own queries; a sum over those ranks, DP.
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

    Collectives: all-reduce of the replicated part and of that of shared key-value heads over the TP group; of these and
        what TP splits over the DP group; of what EP splits over the group of its copies. A part that is empty (the same
        on all ranks) is left out.
    """
    layout, grads = runtime.layout, adapter.grads if grads is None else grads
    if layout.tp_size > 1:
        _sum(grads[adapter.replicated], runtime.tp_group)
        _sum_over_copies(grads[adapter.over_kv], adapter.kv_copies, runtime)
    if layout.dp_size > 1:
        _sum(grads[: adapter.over_tp.stop], runtime.dp_group)
    if layout.expert_copies > 1:
        _sum(grads[adapter.over_ep], runtime.expert_copies_group)


def _sum(part: torch.Tensor, group: dist.ProcessGroup) -> None:
    if part.numel():
        dist.all_reduce(part, group=group)


def _sum_over_copies(part: torch.Tensor, copies: int, runtime: Runtime) -> None:
    """Sum over runs of `copies` consecutive TP ranks: one all-reduce over the whole group, each run in its own row. The
    part is small (B of k and v), and a group of its own would cost NCCL more memory than the rows.
    """
    if copies > 1:
        rows = part.new_zeros(runtime.layout.tp_size // copies, part.numel())
        mine = rows[runtime.tp_rank // copies]
        mine.copy_(part)
        dist.all_reduce(rows, group=runtime.tp_group)
        part.copy_(mine)


def keep_one_share(adapter: Adapter, runtime: Runtime) -> None:
    """The way back from a whole gradient on every rank to shares whose sum it is: the first rank of each sum has it
    all, the others zero. No communication.
    """
    place, grads = runtime.place, adapter.grads
    if place.tp_rank != 0 or place.dp_rank != 0:
        grads[adapter.replicated].zero_()
    if place.tp_rank % adapter.kv_copies or place.dp_rank != 0:
        grads[adapter.over_kv].zero_()
    if place.dp_rank != 0:
        grads[adapter.over_tp].zero_()
    if place.expert_copy != 0:
        grads[adapter.over_ep].zero_()


def gradient_norm(adapter: Adapter, runtime: Runtime) -> float:
    """Euclidean norm of the whole gradient, every matrix counted once; equal on every rank.

    Collectives: one all-reduce of a scalar over the TP, EP and pipeline groups each.
    """
    parts = (adapter.replicated, adapter.over_kv, adapter.over_tp, adapter.over_ep)
    squares = torch.stack([_sum_of_squares(adapter.grads[part]) for part in parts])
    squares[1] /= adapter.kv_copies
    if runtime.layout.tp_size > 1:
        dist.all_reduce(squares[1:3], group=runtime.tp_group)
    if runtime.layout.ep_size > 1:
        dist.all_reduce(squares[3:4], group=runtime.ep_group)
    total = squares.sum()
    if runtime.layout.pp_size > 1:
        dist.all_reduce(total, group=runtime.forward_group)
    return math.sqrt(total.item())


def _sum_of_squares(vector: torch.Tensor) -> torch.Tensor:
    """A float64 scalar. A norm in float64 copies what it is given, so it is given pieces (32 MiB of copy): a whole
    gradient may be gigabytes, and a step that fails here has had its gradients summed over the ranks already. On a CPU
    float32 inside pieces of 65,536: off by 6e-7 at most where it was tried, and 24 ms instead of 105 ms for 26 million
    entries.
    """
    if vector.device.type != "cpu":
        pieces = [torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in vector.split(2**22)]
    else:
        pieces = [torch.dot(piece, piece) for piece in vector.split(2**16)]
    return torch.stack(pieces).double().sum()
