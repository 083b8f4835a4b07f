"""DeepSeek-V3 and what is built like it (R1, Moonlight): latent attention, many small experts, shared ones.

The router scores with a sigmoid, chooses by score plus a bias of each expert, among the best groups of experts, and
weighs by the score alone. The first layers are dense. Layers for predicting several tokens are not read.
DeepSeek-AI 2024, arXiv:2412.19437.
"""

from __future__ import annotations

import math
from typing import Any

from .architecture import Architecture, Experts, Latent, decoder


def architecture(hf_config: Any) -> Architecture:
    latent = Latent(
        q_rank=hf_config.q_lora_rank,
        kv_rank=hf_config.kv_lora_rank,
        nope_dim=hf_config.qk_nope_head_dim,
        rope_dim=hf_config.qk_rope_head_dim,
        value_dim=hf_config.v_head_dim,
        interleaved_rope=bool(hf_config.rope_interleave),
    )
    experts = Experts(
        count=hf_config.n_routed_experts,
        top_k=hf_config.num_experts_per_tok,
        ffn_size=hf_config.moe_intermediate_size,
        normalize_weights=bool(hf_config.norm_topk_prob),
        sigmoid=True,
        groups=hf_config.n_group or 1,
        top_groups=hf_config.topk_group or 1,
        scaling=hf_config.routed_scaling_factor,
        shared_ffn_size=hf_config.moe_intermediate_size * hf_config.n_shared_experts,
    )
    return decoder(
        hf_config,
        head_dim=latent.nope_dim + latent.rope_dim,
        num_kv_heads=hf_config.num_attention_heads,
        latent=latent,
        softmax_scale=_softmax_scale(hf_config),
        experts=experts,
        expert_layers=frozenset(range(hf_config.first_k_dense_replace, hf_config.num_hidden_layers)),
        unread_layers=hf_config.num_mtp_layers,
    )


def _softmax_scale(hf_config: Any) -> float:
    """YaRN sharpens the softmax of longer contexts (mscale): modeling_deepseek_v3.py, yarn_apply_mscale."""
    scale = (hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim) ** -0.5
    rope = hf_config.rope_parameters
    if rope.get("rope_type", "default") == "default" or not rope.get("mscale_all_dim") or rope["factor"] <= 1:
        return scale
    return scale * (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
