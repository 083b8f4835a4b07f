"""gpt-oss (20b, 120b): experts with biases and a clamped SwiGLU, attention with sinks, every second layer in a window.

The router's softmax runs over the chosen logits alone, which is the softmax over all, scaled to sum to 1. Checkpoints
hold one tensor for all experts of a layer, gate and up interleaved (`Experts.fused`).
"""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Experts, decoder


def architecture(hf_config: Any) -> Architecture:
    layers = range(hf_config.num_hidden_layers)
    experts = Experts(
        count=hf_config.num_local_experts,
        top_k=hf_config.num_experts_per_tok,
        ffn_size=hf_config.intermediate_size,
        normalize_weights=True,
        router_name="router",
        router_bias=True,
        bias=True,
        fused=True,
        swiglu_alpha=hf_config.swiglu_alpha,
        swiglu_limit=hf_config.swiglu_limit,
    )
    sliding = frozenset(i for i in layers if hf_config.layer_types[i] == "sliding_attention")
    return decoder(
        hf_config,
        qkv_bias=bool(hf_config.attention_bias),
        out_bias=bool(hf_config.attention_bias),
        sinks=True,
        window=hf_config.sliding_window,
        window_layers=sliding,
        experts=experts,
        expert_layers=frozenset(layers),
    )
