"""The experts of one layer that this rank holds: stacked frozen gated MLPs, and the LoRA added to them.

LoRA "shared-outer", as Tinker trains it: of each expert matrix the factor on the hidden side is shared by all experts
of the layer, the other is the expert's own. Per-expert adapters are the same code with both factors stacked. Which
experts a rank holds changes nothing about the numbers: shared factors are replicated, and their gradients summed over
all ranks of the stage (grad_sync.py).

Shapes: N rows sorted by expert, M those of one adapter, E experts of this rank, D hidden, F the experts' width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import LoraWeights
from .families import Experts
from .grouped import Groups, frozen_grouped, grouped
from .permutation import inverse_of, permuted
from .projections import expert_path
from .row_products import whole_vectors


class StackedExperts(nn.Module):
    """`gate_up_EGD` [E, 2F, D] (gate above up) and `down_EDF` [E, D, F]; where experts have biases, `gate_up_bias_EG`
    and `down_bias_ED` too.
    """

    def __init__(
        self,
        *,
        layer: int,
        num_local: int,
        hidden_size: int,
        experts: Experts,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        ffn_size = experts.ffn_size

        def frozen(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.gate_up_EGD = frozen(num_local, 2 * ffn_size, hidden_size)
        self.down_EDF = frozen(num_local, hidden_size, ffn_size)
        self.gate_up_bias_EG = frozen(num_local, 2 * ffn_size) if experts.bias else None
        self.down_bias_ED = frozen(num_local, hidden_size) if experts.bias else None
        self.swiglu_alpha, self.swiglu_limit = experts.swiglu_alpha, experts.swiglu_limit
        self.paths = tuple(expert_path(layer, name) for name in ("gate_proj", "up_proj", "down_proj"))

    # Views made once: frozen_linear.py remembers how it laid out a matrix by the tensor object.
    @cached_property
    def _gate_up(self) -> tuple[Tensor, ...]:
        return self.gate_up_EGD.detach().unbind()

    @cached_property
    def _down(self) -> tuple[Tensor, ...]:
        return self.down_EDF.detach().unbind()

    def forward(
        self, x_ND: Tensor, groups: Groups, table: Sequence[LoraWeights | None], numbers_N: Tensor | None
    ) -> Tensor:
        """[N, D], not yet weighted. Row n uses the adapter table[numbers_N[n]]; without numbers all use table[0].

        Collectives: none.
        """
        gate, up, down = self.paths
        gate_up_NG = frozen_grouped(x_ND, self.gate_up_EGD, self._gate_up, groups)
        expert_N = None if self.gate_up_bias_EG is None else groups.expert_of_row(len(x_ND))
        if self.gate_up_bias_EG is not None:
            gate_up_NG = gate_up_NG + self.gate_up_bias_EG[expert_N]
        rows = _Rows(groups, table, numbers_N)
        gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
        inputs = rows.by_adapter(x_ND, gate, up)
        gate_NF, up_NF = rows.adapted(gate_NF, inputs, gate), rows.adapted(up_NF, inputs, up)
        act_NF = self._gated(whole_vectors(gate_NF), whole_vectors(up_NF))[:, : gate_NF.shape[1]]
        out_ND = frozen_grouped(act_NF, self.down_EDF, self._down, groups)
        if self.down_bias_ED is not None:
            out_ND = out_ND + self.down_bias_ED[expert_N]
        return rows.adapted(out_ND, rows.by_adapter(act_NF, down), down)

    def _gated(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        if self.swiglu_alpha is None:
            return F.silu(gate_NF) * up_NF
        gate_NF = gate_NF.clamp(max=self.swiglu_limit)
        up_NF = up_NF.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
        return gate_NF * torch.sigmoid(gate_NF * self.swiglu_alpha) * (up_NF + 1)


class _Rows:
    """The rows of one forward, by the adapter they use. Each input is put in their order once, for all projections that
    read it: what the backward keeps of it is that copy, as large as the input itself.
    """

    def __init__(self, groups: Groups, table: Sequence[LoraWeights | None], numbers_N: Tensor | None) -> None:
        self._orders: tuple[Tensor, Tensor] | None = None
        """into the adapters' order and back; None: all rows use one adapter"""
        self._parts: list[tuple[LoraWeights | None, Groups]] = [(table[0], groups)]
        """adapter, and how its rows are grouped by expert"""
        self._sizes: list[int] = []
        if numbers_N is None:
            return
        # Counted for all adapters at once: on CUDA the host waits for the device once, not twice for each of them.
        num_experts = len(groups.counts_E)
        place_N = numbers_N * num_experts + groups.expert_of_row(len(numbers_N))
        counts = place_N.new_zeros(len(table) * num_experts).scatter_add_(0, place_N, torch.ones_like(place_N))
        counts_by_adapter = counts.view(len(table), num_experts)
        order_N = numbers_N.argsort(stable=True)
        self._orders = order_N, inverse_of(order_N)
        self._sizes = counts_by_adapter.sum(1).tolist()
        self._parts = [(lora, Groups(counts_E)) for lora, counts_E in zip(table, counts_by_adapter, strict=True)]

    def by_adapter(self, x_NI: Tensor, *paths: str) -> Sequence[Tensor]:
        """The rows of each adapter, for the projections `paths`; nothing where no adapter has any of them."""
        if not any(lora is not None and path in lora.pairs for lora, _ in self._parts for path in paths):
            return ()
        return (x_NI,) if self._orders is None else permuted(x_NI, *self._orders).split(self._sizes)

    def adapted(self, out_NO: Tensor, inputs: Sequence[Tensor], path: str) -> Tensor:
        """out plus the update of the projection `path`; its inputs as by_adapter gave them."""
        if not inputs:
            return out_NO
        deltas = [_delta(x_MI, lora, path, groups) for x_MI, (lora, groups) in zip(inputs, self._parts, strict=True)]
        present = [delta for delta in deltas if delta is not None]
        if not present:
            return out_NO
        if self._orders is None:
            return out_NO + present[0]
        order_N, inverse_N = self._orders
        num_outputs = out_NO.shape[1]
        whole = [
            out_NO.new_zeros(len(x_MI), num_outputs) if delta is None else delta
            for x_MI, delta in zip(inputs, deltas, strict=True)
        ]
        return out_NO + permuted(torch.cat(whole), inverse_N, order_N)


def _delta(x_MI: Tensor, lora: LoraWeights | None, path: str, groups: Groups) -> Tensor | None:
    """(alpha / rank) * (x A^T) B^T with each row's expert's A and B; None without rows, or where it is not adapted."""
    pair = None if lora is None else lora.pairs.get(path)
    if lora is None or pair is None or not len(x_MI):
        return None
    h_MR = grouped(x_MI, pair.a.to(x_MI.dtype), groups) * lora.scaling
    return grouped(h_MR, pair.b.to(x_MI.dtype), groups)
