"""The megatron-core layer specification: stock blocks, with our own norm, activation and attention.

Stock megatron-core without TransformerEngine cannot do this: its norm refuses sequence parallelism, its attention
refuses packing and materialises the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from .attention import PackedAttention
from .families import Architecture
from .interface import Layout
from .rms_norm import RMSNorm
from .swiglu import SwiGlu


def transformer_config(arch: Architecture, layout: Layout, dtype: torch.dtype, *, on_cpu: bool) -> TransformerConfig:
    """megatron-core's configuration: no dropout, no fusions (they need Apex or TransformerEngine), nothing drawn."""
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        # With more ranks than key-value heads, ranks hold copies: the same as a model that has as many heads as ranks.
        num_query_groups=max(arch.num_kv_heads, layout.tp_size),
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_size,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=arch.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=arch.out_bias,  # of the attention's output, and of dense MLPs: no family has both
        add_qkv_bias=arch.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        use_te_activation_func=True,  # despite its name: hands the activation gate and up together (swiglu.py)
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        sequence_parallel=layout.tp_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )


def block_spec(
    config: TransformerConfig, arch: Architecture, stage: Sequence[int], *, is_last: bool
) -> TransformerBlockSubmodules:
    """Specification of a stage's decoder layers, and the final norm on the last.

    Layers with experts come without MLP: model.py puts a MoeMlp there, which megatron-core's builder does not know.
    """
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.mlp.submodules.activation_func = SwiGlu
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if arch.latent is not None:  # model.py puts a LatentAttention there
        parts.self_attention = IdentityOp
    sparse: Any = replace(layer, submodules=replace(parts, mlp=IdentityOp))
    specs = [sparse if index in arch.expert_layers else layer for index in stage]
    norm: Any = RMSNorm if is_last else None
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
