"""The experts of one layer that this rank holds: stacked frozen gated MLPs, and the LoRA added to them.

LoRA "shared-outer", as Tinker trains it: of each expert matrix the factor on the hidden side is shared by all experts
of the layer, the other is the expert's own. Per-expert adapters are the same code with both factors stacked. Which
experts a rank holds changes nothing about the numbers: shared factors are replicated, and their gradients summed over
all ranks of the stage (grad_sync.py).

Shapes: N rows sorted by expert, E experts of this rank, D hidden, F the experts' width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import LoraPair, LoraWeights
from .families import Experts
from .grouped import Groups, frozen_grouped, grouped
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
        gate_NF, up_NF = rows.adapted(gate_NF, x_ND, gate), rows.adapted(up_NF, x_ND, up)
        act_NF = self._gated(whole_vectors(gate_NF), whole_vectors(up_NF))[:, : gate_NF.shape[1]]
        out_ND = frozen_grouped(act_NF, self.down_EDF, self._down, groups)
        if self.down_bias_ED is not None:
            out_ND = out_ND + self.down_bias_ED[expert_N]
        return rows.adapted(out_ND, act_NF, down)

    def _gated(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        if self.swiglu_alpha is None:
            return F.silu(gate_NF) * up_NF
        gate_NF = gate_NF.clamp(max=self.swiglu_limit)
        up_NF = up_NF.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
        return gate_NF * torch.sigmoid(gate_NF * self.swiglu_alpha) * (up_NF + 1)


class _Rows:
    """The rows of one forward, by the adapter they use."""

    def __init__(self, groups: Groups, table: Sequence[LoraWeights | None], numbers_N: Tensor | None) -> None:
        self.parts: list[tuple[LoraWeights, Tensor | None, Groups]] = []
        """adapter, its rows (None: all), and how they are grouped by expert"""
        if numbers_N is None:
            self.parts = [(table[0], None, groups)] if table[0] is not None else []
            return
        # Counted for all adapters at once: on CUDA the host waits for the device once, not twice for each of them.
        num_experts = len(groups.counts_E)
        place_N = numbers_N * num_experts + groups.expert_of_row(len(numbers_N))
        counts = place_N.new_zeros(len(table) * num_experts).scatter_add_(0, place_N, torch.ones_like(place_N))
        counts_by_adapter = counts.view(len(table), num_experts)
        rows_by_adapter = numbers_N.argsort(stable=True).split(counts_by_adapter.sum(1).tolist())
        for lora, rows, counts_E in zip(table, rows_by_adapter, counts_by_adapter, strict=True):
            if lora is not None and len(rows):
                self.parts.append((lora, rows, Groups(counts_E)))

    def adapted(self, out_NO: Tensor, x_NI: Tensor, path: str) -> Tensor:
        """out plus the update of the projection `path`."""
        for lora, rows, groups in self.parts:
            pair = lora.pairs.get(path)
            if pair is None:
                continue
            if rows is None:
                out_NO = out_NO + _delta(x_NI, pair, lora.scaling, groups)
            else:
                out_NO = out_NO.index_add(0, rows, _delta(x_NI[rows], pair, lora.scaling, groups))
        return out_NO


def _delta(x_NI: Tensor, pair: LoraPair, scaling: float, groups: Groups) -> Tensor:
    """(alpha / rank) * (x A^T) B^T with each row's expert's A and B."""
    h_NR = grouped(x_NI, pair.a.to(x_NI.dtype), groups) * scaling
    return grouped(h_NR, pair.b.to(x_NI.dtype), groups)
