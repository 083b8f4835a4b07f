"""Mixture of experts as a layer's MLP: the frozen router chooses, tokens travel to their experts and back.

Under expert parallelism each rank sends its own tokens (under sequence parallelism, its share of the sequence) to the
ranks that hold the chosen experts, with all-to-alls of uneven sizes; a rank without a token for an expert, or without
any data, takes part all the same. The weighted sum of a token's experts is taken where the token lives, in the order
the router chose them, so the result does not depend on how many ranks share the experts. No operation adds into the
same place from several threads, so a repeated step gives the same bits on CUDA too.

Shapes: L this rank's tokens, K experts of a token, A = L * K, N rows that arrived, E all experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor, nn

from .experts import StackedExperts
from .families import Experts
from .frozen_linear import frozen_linear
from .grouped import Groups
from .lora_linear import Routing
from .permutation import inverse_of, permuted

Choose = Callable[[Tensor], Tensor]
"""From the experts that the router would choose, int64 [L, K], those that are taken."""


class Router(nn.Module):
    """Softmax over all experts in float32, the top k of it; frozen, but differentiable in x, as in transformers."""

    def __init__(self, experts: Experts, hidden_size: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        weight = torch.empty(experts.count, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = torch.empty(experts.count, dtype=dtype, device=device) if experts.router_bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        # Stays in float32, as transformers keeps it.
        correction = torch.empty(experts.count, dtype=torch.float32, device=device) if experts.sigmoid else None
        self.correction = None if correction is None else nn.Parameter(correction, requires_grad=False)
        self.experts = experts

    def forward(self, x_LD: Tensor, choose: Choose | None = None) -> tuple[Tensor, Tensor]:
        """Chosen experts int64 [L, K], best first, and their weights [L, K], dtype of x.

        Where `choose` takes others, these weights are of the same scores: the experts taken share what they have.
        """
        if self.correction is not None:
            return self._by_sigmoid(x_LD, self.correction, choose)
        probabilities_LE = frozen_linear(x_LD, self.weight, self.bias).softmax(dim=-1, dtype=torch.float32)
        weights_LK, chosen_LK = probabilities_LE.topk(self.experts.top_k, dim=-1)
        if choose is not None:
            chosen_LK = choose(chosen_LK)
            weights_LK = probabilities_LE.gather(1, chosen_LK)
        if self.experts.normalize_weights:
            weights_LK = weights_LK / weights_LK.sum(dim=-1, keepdim=True)
        return chosen_LK, weights_LK.to(x_LD.dtype)

    def _by_sigmoid(self, x_LD: Tensor, correction_E: Tensor, choose: Choose | None) -> tuple[Tensor, Tensor]:
        """DeepSeek-V3's choice: arXiv:2412.19437, section 2.1.2, without the auxiliary loss."""
        experts = self.experts
        scores_LE = F.linear(x_LD.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            biased_LE = scores_LE + correction_E
            if experts.groups > 1:
                by_group_LGM = biased_LE.unflatten(1, (experts.groups, -1))
                group_LG = by_group_LGM.topk(2, dim=-1).values.sum(-1)
                closed_LG = torch.ones_like(group_LG, dtype=torch.bool)
                closed_LG.scatter_(1, group_LG.topk(experts.top_groups, dim=-1).indices, False)
                biased_LE = by_group_LGM.masked_fill(closed_LG[..., None], float("-inf")).flatten(1)
            chosen_LK = biased_LE.topk(experts.top_k, dim=-1).indices
            if choose is not None:
                chosen_LK = choose(chosen_LK)
        weights_LK = scores_LE.gather(1, chosen_LK)
        if experts.normalize_weights:
            weights_LK = weights_LK / (weights_LK.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen_LK, (weights_LK * experts.scaling).to(x_LD.dtype)


class MoeMlp(nn.Module):
    """Takes the place of megatron-core's `mlp` in a layer."""

    routing: Routing
    ep_group: dist.ProcessGroup
    place: int

    def __init__(self, router: Router, experts: StackedExperts, shared: nn.Module | None = None) -> None:
        """`shared`: megatron-core's MLP beside the experts, split over TP like any other."""
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def connect(self, routing: Routing, ep_group: dist.ProcessGroup, place: int) -> None:
        """Before the first forward: which adapters the tokens use, the ranks that hold the other experts, and this
        layer's number among all that have experts.
        """
        self.routing = routing
        self.ep_group = ep_group
        self.place = place

    def forward(self, x_L1D: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[L, 1, D] -> ([L, 1, D], no bias).

        Collectives: those of the shared MLP, and over ep_group where it is larger than 1: all-to-all of counts, of
        rows, of adapter numbers where adapters are mixed, of results; in backward two of rows.
        """
        x_LD = x_L1D[:, 0]
        given, noted = self.routing.given, self.routing.noted
        chosen_LK, weights_LK = self.router(x_LD, given and partial(given.choose, self.place))
        if noted is not None:
            noted[self.place] = chosen_LK
        num_tokens, top_k = chosen_LK.shape
        order_A = chosen_LK.flatten().argsort(stable=True)
        inverse_A = inverse_of(order_A)
        rows_AD = _Spread.apply(x_LD, order_A, inverse_A, top_k)
        chosen_A = chosen_LK.flatten()  # not bincount, for which the host waits on CUDA
        counts_E = chosen_A.new_zeros(self.router.experts.count).scatter_add_(0, chosen_A, torch.ones_like(chosen_A))
        table, numbers_A = self.routing.table, None
        if len(table) > 1:
            numbers_A = self.routing.local_numbers(x_LD.device)[order_A // top_k]
        if self.ep_group.size() == 1:
            y_AD = self.experts(rows_AD, Groups(counts_E), table, numbers_A)
        else:
            y_AD = self._exchanged(rows_AD, counts_E, numbers_A)
        y_LKD = permuted(y_AD, inverse_A, order_A).view(num_tokens, top_k, -1)
        out_L1D = (y_LKD * weights_LK[..., None]).sum(1)[:, None]
        return (out_L1D if self.shared is None else out_L1D + self.shared(x_L1D)[0]), None

    def _exchanged(self, rows_AD: Tensor, counts_E: Tensor, numbers_A: Tensor | None) -> Tensor:
        """Rows to the ranks of their experts, through them, and back in the same order."""
        ep_size, group = self.ep_group.size(), self.ep_group
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=group)
        arriving_SE = arriving_E.view(ep_size, -1)  # by source rank and local expert
        leaving, coming = torch.stack((counts_E.view(ep_size, -1).sum(1), arriving_SE.sum(1))).tolist()
        rows_ND = all_to_all(group, rows_AD, coming, leaving)
        # What arrived is sorted by source, then by expert.
        local = torch.arange(arriving_SE.shape[1], device=rows_AD.device).repeat(ep_size)
        order_N = local.repeat_interleave(arriving_E, output_size=sum(coming)).argsort(stable=True)
        inverse_N = inverse_of(order_N)
        numbers_N = None
        if numbers_A is not None:
            numbers_N = numbers_A.new_empty(sum(coming))
            dist.all_to_all_single(numbers_N, numbers_A, coming, leaving, group=group)
            numbers_N = numbers_N[order_N]
        x_ND = permuted(rows_ND, order_N, inverse_N)
        y_ND = self.experts(x_ND, Groups(arriving_SE.sum(0)), self.routing.table, numbers_N)
        return all_to_all(group, permuted(y_ND, inverse_N, order_N), leaving, coming)


class _Spread(torch.autograd.Function):
    """Row a of the result is token order[a] // top_k. The gradient sums a token's rows in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_LD: Tensor, order_A: Tensor, inverse_A: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_A)
        ctx.top_k = top_k
        return x_LD[order_A // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_A,) = ctx.saved_tensors
        return grads[0][inverse_A].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None
