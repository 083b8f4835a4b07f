"""Routing replay: tokens are trained with the experts that they went through while they were sampled.

In bfloat16 sampler and trainer round differently, and near a tie they choose other experts; the policy that is trained
is then not quite the one that sampled. "Rollout routing replay", Ma et al. 2025, arXiv:2510.11370: the choices are
noted while sampling and taken while training; the weights of the chosen experts, and their gradient, are still of the
trainer's own scores. (GSPO's routing replay, arXiv:2507.18071, section 5.3, is the same with the choices of an older
policy's trainer.)

Here: what is noted in a forward without gradients, and what is given to one with them. `Routing` (lora_linear.py)
carries both past the layers in between to the routers.

Shapes: T tokens of a forward with padding, L a TP rank's share of them, M layers with experts, K experts of a token.
A layer's *place* is its number among the M, the same under every layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .families import Experts
from .interface import Choices
from .runtime import Runtime


@dataclass(frozen=True)
class Given:
    """The experts that tokens of a forward are to go through: of all of them, or of this TP rank's share."""

    experts_TMK: Tensor
    """uint8 or int16; anything where a token has none"""
    replayed_T: Tensor
    """bool: those that have"""

    def share(self, start: int, end: int) -> Given:
        """Of tokens start..end-1."""
        return Given(self.experts_TMK[start:end], self.replayed_T[start:end])

    def choose(self, place: int, own_LK: Tensor) -> Tensor:
        """int64 [L, K]: what was given to the layer at `place`, else the router's own choice."""
        return torch.where(self.replayed_T[:, None], self.experts_TMK[:, place].long(), own_LK)


def gather_noted(
    noted: Mapping[int, Tensor], num_tokens: int, *, num_layers: int, experts: Experts, runtime: Runtime
) -> Choices:
    """What all ranks of a copy noted in one forward: [T, M, K], on each of them.

    Args: noted: by place, int64 [L, K], of this stage's layers and this rank's share of the tokens.
    Collectives: one all-reduce over the TP group and one over the stages, where those are larger than 1.
    """
    share = num_tokens // runtime.layout.tp_size
    start = runtime.tp_rank * share
    dtype = torch.uint8 if experts.count <= 256 else torch.int16
    all_TMK = torch.zeros(num_tokens, num_layers, experts.top_k, dtype=dtype, device=runtime.device)
    for place, chosen_LK in noted.items():
        all_TMK[start : start + share, place] = chosen_LK.to(dtype)
    # Zero but on one rank, so the sum is a gather, byte by byte too: no backend knows int16.
    if runtime.layout.tp_size > 1:
        dist.all_reduce(all_TMK.view(torch.uint8), group=runtime.tp_group)
    if runtime.layout.pp_size > 1:
        dist.all_reduce(all_TMK.view(torch.uint8), group=runtime.forward_group)
    found: Choices = all_TMK.cpu().numpy()
    return found
