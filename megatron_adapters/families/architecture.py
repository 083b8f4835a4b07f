"""The model facts that the rest of the package reads, and how the families' common fields become them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinker_hpc.quantised import fp8_block
from tinker_hpc.supported_models import check_supported


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a layer: each token goes through `top_k` of `count` gated MLPs of width `ffn_size`."""

    count: int
    top_k: int
    ffn_size: int
    normalize_weights: bool
    """the weights of a token's chosen experts are scaled to sum to 1 (norm_topk_prob)"""
    router_name: str = "gate"
    """what a checkpoint calls the router"""
    router_bias: bool = False
    """added to the router's logits"""
    bias: bool = False
    """on gate, up and down of every expert"""
    fused: bool = False
    """a checkpoint holds one tensor [count, in, out] for all experts of a layer, gate and up interleaved, and not three
    [out, in] for each"""
    swiglu_alpha: float | None = None
    """gate * sigmoid(alpha * gate) * (up + 1), gate and up clamped at swiglu_limit; None: silu(gate) * up"""
    swiglu_limit: float = 0.0
    sigmoid: bool = False
    """scores by sigmoid, choice by score plus a bias of each expert (e_score_correction_bias); else softmax"""
    groups: int = 1
    top_groups: int = 1
    """experts are chosen among those of this many groups, the best by their two best experts; with sigmoid alone"""
    scaling: float = 1.0
    """factor on the weights, after they are scaled to sum to 1; with sigmoid alone"""
    shared_ffn_size: int = 0
    """width of a gated MLP beside the experts, for every token; 0: none"""


@dataclass(frozen=True)
class Latent:
    """Widths of latent attention; see latent_attention.py. The first four count elements of a token or head."""

    q_rank: int | None
    """of the vector that queries come from; None: they come from the hidden state"""
    kv_rank: int
    nope_dim: int
    """of a head's query or key, without positions"""
    rope_dim: int
    value_dim: int
    interleaved_rope: bool
    """pairs that rotate together lie side by side, not in two halves"""


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder. Widths count elements; all before any sharding."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    out_bias: bool = False
    """on the attention's output"""
    sinks: bool = False
    """see ruled_attention.py"""
    window: int | None = None
    """tokens that a token of `window_layers` sees, itself included"""
    window_layers: frozenset[int] = frozenset()
    latent: Latent | None = None
    """head_dim is then that of queries and keys, and every head has keys and values of its own"""
    softmax_scale: float | None = None
    """None: 1 / sqrt(head_dim)"""
    unread_layers: int = 0
    """layers behind the last that a checkpoint may hold and we do not use"""
    experts: Experts | None = None
    expert_layers: frozenset[int] = frozenset()
    """layers (from 0) whose MLP is a mixture of experts; the others are dense"""
    fp8_block: tuple[int, int] | None = None
    """rows and columns that share a factor, where a checkpoint holds matrices in FP8; see tinker_hpc/quantised.py"""

    def expert_place(self, layer: int) -> int:
        """The number of a layer with experts among all that have some."""
        return sum(other < layer for other in self.expert_layers)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """of a head"""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def rope_dim(self) -> int:
        """of a head's query or key, the part that is rotated"""
        return self.head_dim if self.latent is None else self.latent.rope_dim


def decoder(hf_config: Any, *, qkv_bias: bool = False, qk_norm: bool = False, **more: Any) -> Architecture:
    """The architecture of a decoder that names its sizes as Llama does.

    Args:
        hf_config: a transformers configuration.
        more: further fields of `Architecture`, or others than Llama's.
    Raises: ConfigError for a switch we do not implement; better than wrong numbers.
    """
    config, where = hf_config.to_dict(), f"config.json of this {hf_config.model_type} model"
    check_supported(config, where)  # again: with what transformers takes for switches that the file leaves out
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    fields: dict[str, Any] = {
        "model_type": hf_config.model_type,
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_size": hf_config.intermediate_size,
        "num_heads": hf_config.num_attention_heads,
        "num_kv_heads": hf_config.num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": hf_config.vocab_size,
        "max_context": hf_config.max_position_embeddings,
        "norm_eps": hf_config.rms_norm_eps,
        "tied_embeddings": bool(hf_config.tie_word_embeddings),
        "qkv_bias": qkv_bias,
        "qk_norm": qk_norm,
        "eos_token_ids": as_ids(getattr(hf_config, "eos_token_id", None)),
        "fp8_block": fp8_block(config, where),
    }
    return Architecture(**(fields | more))


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
