"""A stage's decoder layers where no gradient is wanted, with a quarter of the operations of megatron-core's modules.

For the few rows of a decode step the matrix products are half of what a layer costs; the rest is the number of small
operations and the Python between them. So each layer is one function here, on the modules' own weights: queries and
keys are normed and rotated together, residuals are added inside the matrix products, and nothing is copied that can be
viewed. Linears (with their LoRA and tensor parallelism), experts and attention are the modules themselves.

Shapes: L this rank's tokens, T all tokens, D hidden, G this rank's key-value heads, P queries of each, K head_dim,
F this rank's part of the MLP's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from .attention import PackedAttention, PackedContext
from .lora_linear import LoraLinear, Routing, Segment
from .moe import MoeMlp
from .rms_norm import FrozenNorm, RMSNorm
from .rope import rotate_by_roll, signed_sin
from .swiglu import SwiGlu, swiglu


@dataclass(frozen=True)
class _Layer:
    attention_norm: FrozenNorm
    qkv: LoraLinear
    groups: int
    head_dim: int
    qk_norm: FrozenNorm | None
    """of queries and keys, its weight [P + 1, K]"""
    attention: PackedAttention
    proj: LoraLinear
    mlp_norm: FrozenNorm
    mlp: Any
    """an MLP or MoeMlp"""


class Wanted(NamedTuple):
    """Some tokens of a forward, and which adapter each uses."""

    rows_N: Tensor
    """int64, ascending"""
    segments: Sequence[Segment]
    """must tile 0..N"""


class InferenceLayers:
    """Build it with `inference_layers`."""

    def __init__(self, layers: list[_Layer], final_norm: FrozenNorm | None, routing: Routing) -> None:
        self._layers = layers
        self._final_norm = final_norm
        self._routing = routing

    def __call__(self, x_LD: Tensor, context: PackedContext, wanted: Wanted | None = None) -> Tensor:
        """[L, D] -> [L, D], normed on the last stage. Collectives: those of the linears and of MoeMlp, per layer.

        wanted: what to return alone, where no rank has but a part of the tokens.
        """
        assert context.cos_T1K is not None and context.sin_T1K is not None
        cos_sin = context.cos_T1K[:, None], signed_sin(context.sin_T1K)[:, None]
        for layer in self._layers[:-1]:
            x_LD = _rest(layer, x_LD, _attended(layer, x_LD, context, cos_sin))
        layer = self._layers[-1]
        out_TQ = _attended(layer, x_LD, context, cos_sin)
        if wanted is None:
            x_LD = _rest(layer, x_LD, out_TQ)
        else:  # no other token meets these any more
            with self._routing.use(wanted.segments, len(wanted.rows_N), self._routing.table):
                x_LD = _rest(layer, x_LD[wanted.rows_N], out_TQ[wanted.rows_N])
        return x_LD if self._final_norm is None else self._final_norm(x_LD)


def inference_layers(decoder: Any, routing: Routing) -> InferenceLayers | None:
    """For a megatron-core decoder whose linears are wrapped; None where any layer has something this file does not do.

    Which of the two is used is decided here alone.
    """
    layers = []
    for layer in decoder.layers:
        attention = layer.self_attention
        known = (
            type(layer) is TransformerLayer
            and type(attention) is SelfAttention
            and type(attention.core_attention) is PackedAttention
            and (type(layer.mlp) is MoeMlp or _is_swiglu(layer.mlp))
            and all(type(x) is LoraLinear for x in (attention.linear_qkv, attention.linear_proj))
            and not getattr(layer.config, "attention_output_gate", False)
        )
        if not known:
            return None
        norms: Any = tuple(None if type(x) is IdentityOp else x for x in (attention.q_layernorm, attention.k_layernorm))
        all_norms = (*(norm for norm in norms if norm is not None), layer.input_layernorm, layer.pre_mlp_layernorm)
        if any(type(norm) is not RMSNorm for norm in all_norms):
            return None
        layers.append(_layer(layer, *norms))
    final_norm = getattr(decoder, "final_layernorm", None)
    return InferenceLayers(layers, None if final_norm is None else _frozen(final_norm), routing)


def _frozen(norm: RMSNorm) -> FrozenNorm:
    return FrozenNorm(lambda: norm.weight, norm.eps)


def _is_swiglu(mlp: Any) -> bool:
    return type(mlp) is MLP and type(mlp.activation_func) is SwiGlu


def _layer(layer: Any, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> _Layer:
    attention = layer.self_attention
    groups = attention.num_query_groups_per_partition
    queries = attention.num_attention_heads_per_partition // groups
    qk_norm = None
    if q_norm is not None and k_norm is not None:
        q_weight_K, k_weight_K = q_norm.weight, k_norm.weight
        qk_norm = FrozenNorm(lambda: torch.cat((q_weight_K.expand(queries, -1), k_weight_K[None])), q_norm.eps)
    return _Layer(
        attention_norm=_frozen(layer.input_layernorm),
        qkv=attention.linear_qkv,
        groups=groups,
        head_dim=attention.hidden_size_per_attention_head,
        qk_norm=qk_norm,
        attention=attention.core_attention,
        proj=attention.linear_proj,
        mlp_norm=_frozen(layer.pre_mlp_layernorm),
        mlp=layer.mlp,
    )


def _attended(layer: _Layer, x_LD: Tensor, context: PackedContext, cos_sin_T11K: tuple[Tensor, Tensor]) -> Tensor:
    """What attention gives, before its output projection: [T, G * P * K]."""
    qkv_TO = layer.qkv.infer(layer.attention_norm(x_LD))
    # megatron-core's order: of each group its queries, key, value.
    qkv_TGhK = qkv_TO.view(qkv_TO.shape[0], layer.groups, -1, layer.head_dim)
    qk_TGhK = qkv_TGhK[:, :, :-1]
    if layer.qk_norm is not None:
        qk_TGhK = layer.qk_norm(qk_TGhK)
    qk_TGhK = rotate_by_roll(qk_TGhK, *cos_sin_T11K)
    return layer.attention.attend(qk_TGhK[:, :, :-1], qk_TGhK[:, :, -1], qkv_TGhK[:, :, -1], context)


def _rest(layer: _Layer, x_LD: Tensor, out_TQ: Tensor) -> Tensor:
    """The layer after attention."""
    x_LD = layer.proj.infer(out_TQ, x_LD)
    normed_LD = layer.mlp_norm(x_LD)
    if isinstance(layer.mlp, MoeMlp):
        return x_LD + layer.mlp(normed_LD[:, None])[0][:, 0]
    return layer.mlp.linear_fc2.infer(swiglu(layer.mlp.linear_fc1.infer(normed_LD)), x_LD)
