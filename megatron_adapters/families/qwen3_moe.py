"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 whose layers route each token to a few of many small MLPs.

Softmax over all experts, the top k of it, scaled to sum to 1 if norm_topk_prob says so; no shared expert, no bias.
"""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Experts, decoder


def architecture(hf_config: Any) -> Architecture:
    experts = Experts(
        count=hf_config.num_experts,
        top_k=hf_config.num_experts_per_tok,
        ffn_size=hf_config.moe_intermediate_size,
        normalize_weights=bool(hf_config.norm_topk_prob),
    )
    step, dense = hf_config.decoder_sparse_step, set(hf_config.mlp_only_layers or ())
    layers = range(hf_config.num_hidden_layers)
    expert_layers = frozenset(i for i in layers if i not in dense and (i + 1) % step == 0)
    return decoder(hf_config, qk_norm=True, experts=experts, expert_layers=expert_layers)
