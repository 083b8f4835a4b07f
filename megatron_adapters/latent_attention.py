"""Latent attention (MLA): keys and values of all heads out of one small vector a token. DeepSeek-AI 2024,
arXiv:2405.04434, as transformers' modeling_deepseek_v3.py computes it.

The small vectors are computed from this rank's share of the tokens, by matrices that every TP rank holds whole; what
makes heads out of them is column-parallel. The rotary part of a key is one for all heads. The cache holds the heads'
keys and values, not the small vectors: more memory, and decoding is ordinary attention.

Shapes: T tokens, L this rank's share of them, H local heads, K = nope + rope dims of a query or key, V of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from .attention import PackedAttention, PackedContext
from .families import Architecture
from .families.architecture import Latent
from .frozen_linear import frozen_linear
from .rms_norm import RMSNorm
from .rope import rotate

NORM_EPS = 1e-6
"""Of the small vectors' norms: transformers' default, whatever the model's own."""


class WholeLinear(nn.Module):
    """A frozen linear that every TP rank holds whole, called like megatron-core's."""

    skip_bias_add = False
    bias = None

    def __init__(self, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return frozen_linear(x, self.weight), None


class LatentAttention(nn.Module):
    """Takes the place of megatron-core's `self_attention` in a layer. Its linears are wrapped for LoRA afterwards."""

    def __init__(
        self, config: Any, arch: Architecture, tp_size: int, dtype: torch.dtype, device: torch.device | None
    ) -> None:
        super().__init__()
        assert arch.latent is not None
        self.latent = latent = arch.latent
        self.local_heads = arch.num_heads // tp_size
        hidden, where = arch.hidden_size, (dtype, device)

        def column(d_in: int, d_out: int) -> nn.Module:
            return ColumnParallelLinear(d_in, d_out, config=config, init_method=_nothing, bias=False)

        if latent.q_rank is None:
            self.linear_q = column(hidden, arch.q_size)
        else:
            self.linear_q_down = WholeLinear(hidden, latent.q_rank, *where)
            self.q_layernorm = RMSNorm(config, latent.q_rank, NORM_EPS)
            self.linear_q_up = column(latent.q_rank, arch.q_size)
        self.linear_kv_down = WholeLinear(hidden, latent.kv_rank + latent.rope_dim, *where)
        self.kv_layernorm = RMSNorm(config, latent.kv_rank, NORM_EPS)
        self.linear_kv_up = column(latent.kv_rank, arch.num_heads * (latent.nope_dim + latent.value_dim))
        self.core_attention = PackedAttention(layer_number=1, softmax_scale=arch.softmax_scale)
        self.linear_proj = RowParallelLinear(
            arch.num_heads * latent.value_dim,
            hidden,
            config=config,
            init_method=_nothing,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedContext, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[L, 1, D] -> ([L, 1, D], no bias).

        Collectives, over the TP group: those of the linears, and one all-gather of the keys' rotary part [L, rope].
        """
        latent, context = self.latent, packed_seq_params
        assert context.cos_T1K is not None and context.sin_T1K is not None
        q_T1O = self._queries(hidden_states)
        down_L1R, _ = self.linear_kv_down(hidden_states)
        small_L1R, k_rope_L1R = down_L1R.split((latent.kv_rank, latent.rope_dim), dim=-1)
        kv_T1O, _ = self.linear_kv_up(self.kv_layernorm(small_L1R))
        # Each rank's heads use all tokens, so gradients are summed on the way back.
        k_rope_T1R = gather_from_sequence_parallel_region(k_rope_L1R, tensor_parallel_output_grad=True)

        heads = (q_T1O.shape[0], self.local_heads, -1)
        q_nope, q_rope = q_T1O.view(heads).split((latent.nope_dim, latent.rope_dim), dim=-1)
        k_nope, v_THV = kv_T1O.view(heads).split((latent.nope_dim, latent.value_dim), dim=-1)
        q_rope, k_rope = (
            rotate(self._halves(x), context.cos_T1K, context.sin_T1K) for x in (q_rope, k_rope_T1R)
        )  # [T, H, rope] and [T, 1, rope]
        q_THK = torch.cat((q_nope, q_rope), dim=-1)
        k_THK = torch.cat((k_nope, k_rope.expand(-1, self.local_heads, -1)), dim=-1)
        out: tuple[Tensor, Tensor | None] = self.linear_proj(
            self.core_attention.attend(q_THK[:, :, None], k_THK, v_THV, context)[:, None]
        )
        return out

    def _queries(self, hidden_L1D: Tensor) -> Tensor:
        if self.latent.q_rank is None:
            return self.linear_q(hidden_L1D)[0]
        return self.linear_q_up(self.q_layernorm(self.linear_q_down(hidden_L1D)[0]))[0]

    def _halves(self, x: Tensor) -> Tensor:
        """Pairs that lie side by side, as the two halves that `rotate` turns."""
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if self.latent.interleaved_rope else x


def latent_linears(latent: Latent) -> list[tuple[str, str, str]]:
    """The linears before the attention: attribute, Hugging Face's name, how TP splits them."""
    queries = [("linear_q", "q_proj", "column")]
    if latent.q_rank is not None:
        queries = [("linear_q_down", "q_a_proj", "whole"), ("linear_q_up", "q_b_proj", "column")]
    keys = [("linear_kv_down", "kv_a_proj_with_mqa", "whole"), ("linear_kv_up", "kv_b_proj", "column")]
    return queries + keys


def _nothing(weight: Tensor) -> None:
    """Weights are loaded, not drawn."""
