"""Which tensors a Hugging Face checkpoint of an architecture holds: names and full shapes. Pure."""

from __future__ import annotations

from .families import Architecture, Experts
from .projections import attention_names, attention_widths

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(arch: Architecture) -> Shapes:
    """Every tensor a checkpoint of this architecture must hold, with its full shape."""
    hidden, ffn, q, kv = arch.hidden_size, arch.ffn_size, arch.q_size, arch.kv_size
    shapes: Shapes = {
        "model.embed_tokens.weight": (arch.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not arch.tied_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
        for name, (d_in, d_out) in attention_widths(arch).items():
            if name in attention_names(arch):
                shapes[f"{prefix}self_attn.{name}.weight"] = (d_out, d_in)
        if arch.latent is not None:
            shapes[f"{prefix}self_attn.kv_a_layernorm.weight"] = (arch.latent.kv_rank,)
            if arch.latent.q_rank is not None:
                shapes[f"{prefix}self_attn.q_a_layernorm.weight"] = (arch.latent.q_rank,)
        if layer in arch.expert_layers and arch.experts is not None:
            shapes |= _expert_shapes(f"{prefix}mlp.", hidden, arch.experts)
        else:
            shapes |= _mlp_shapes(f"{prefix}mlp.", hidden, ffn)
        if arch.qkv_bias:
            shapes |= {f"{prefix}self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        if arch.out_bias:
            shapes[f"{prefix}self_attn.o_proj.bias"] = (hidden,)
        if arch.sinks:
            shapes[f"{prefix}self_attn.sinks"] = (arch.num_heads,)
        if arch.qk_norm:
            shapes |= {f"{prefix}self_attn.{x}_norm.weight": (arch.head_dim,) for x in "qk"}
    return shapes


def _expert_shapes(prefix: str, hidden: int, experts: Experts) -> Shapes:
    count, ffn = experts.count, experts.ffn_size
    shapes: Shapes = {f"{prefix}{experts.router_name}.weight": (count, hidden)}
    if experts.router_bias:
        shapes[f"{prefix}{experts.router_name}.bias"] = (count,)
    if experts.sigmoid:
        shapes[f"{prefix}{experts.router_name}.e_score_correction_bias"] = (count,)
    if experts.shared_ffn_size:
        shapes |= _mlp_shapes(f"{prefix}shared_experts.", hidden, experts.shared_ffn_size)
    if not experts.fused:
        for expert in range(count):
            shapes |= _mlp_shapes(f"{prefix}experts.{expert}.", hidden, ffn)
        return shapes
    shapes |= {
        f"{prefix}experts.gate_up_proj": (count, hidden, 2 * ffn),
        f"{prefix}experts.down_proj": (count, ffn, hidden),
    }
    if experts.bias:
        shapes |= {
            f"{prefix}experts.gate_up_proj_bias": (count, 2 * ffn),
            f"{prefix}experts.down_proj_bias": (count, hidden),
        }
    return shapes


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }
