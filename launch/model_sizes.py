"""What a model's config.json says about its size: parameters by part, and how many of them one rank holds (pure).

Counted from the fields alone, with no weights and no torch, so that a login node can plan. The models themselves are
built by megatron_adapters; tests hold the two against each other on the meta device.

H hidden, I MLP width, E experts, q and kv attention widths, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinker_hpc.errors import ConfigError
from tinker_hpc.model_config import NUM_EXPERTS_KEYS, language_model
from tinker_hpc.quantised import fp8_block


@dataclass(frozen=True)
class LatentSizes:
    """Widths of DeepSeek's latent attention; q_rank is 0 where queries come from the hidden state."""

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def matrices(self, hidden: int, heads: int) -> list[tuple[int, int]]:
        """Inputs and outputs of every matrix of a layer, with `heads` heads (a TP rank's)."""
        q_size = heads * (self.nope_dim + self.rope_dim)
        queries = [(hidden, self.q_rank), (self.q_rank, q_size)] if self.q_rank else [(hidden, q_size)]
        return [
            *queries,
            (hidden, self.kv_rank + self.rope_dim),
            (self.kv_rank, heads * (self.nope_dim + self.value_dim)),
            (heads * self.value_dim, hidden),
        ]


@dataclass(frozen=True)
class ModelSizes:
    """Widths of one decoder, before any sharding."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Of a dense MLP; 0 where every layer has experts."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    num_dense_layers: int = 0
    """Of the layers, those with a dense MLP; all of them where there are no experts."""
    out_bias: bool = False
    """On the attention's output."""
    sinks: bool = False
    """A number per head in the softmax: attention by another path (megatron_adapters/ruled_attention.py)."""
    expert_bias: bool = False
    """On every expert and the router."""
    shared_ffn_size: int = 0
    """Of the MLP beside the experts."""
    latent: LatentSizes | None = None
    """Latent attention: head_dim is that of queries and keys, and every head has its own."""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_expert_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def num_parameters(self) -> int:
        """All weights of the base model."""
        return sum(base_parameters(self, Split()).values())

    @property
    def num_active_parameters(self) -> int:
        """Weights that take part in the matrix products of one token: without the embedding lookup and idle experts."""
        idle = (self.num_experts - self.experts_per_token) * 3 * self.hidden_size * self.expert_ffn_size
        lookup = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return self.num_parameters - lookup - self.num_expert_layers * idle

    @property
    def flops_per_trained_token(self) -> int:
        """4 N, N the active parameters without norms: 2 N forward and 2 N backward, since the base has no weight
        gradients. Attention's own products and LoRA's are not in it. What MFU is counted with.
        """
        return 4 * (self.num_active_parameters - base_parameters(self, Split())["norms"])


@dataclass(frozen=True)
class Split:
    """Into how many parts the matrices are cut; every size 1 is the whole model."""

    tp_size: int = 1
    ep_size: int = 1
    pp_size: int = 1

    def kv_heads(self, sizes: ModelSizes) -> int:
        """Key-value heads of a rank: with more ranks than heads, ranks hold copies."""
        return max(1, sizes.num_kv_heads // self.tp_size)

    def vocab_rows(self, sizes: ModelSizes) -> int:
        """Rows of a rank's embedding, padding included."""
        return -(-sizes.vocab_size // self.tp_size)

    def stage_layers(self, sizes: ModelSizes) -> int:
        """Layers of the longest pipeline stage."""
        return -(-sizes.num_layers // self.pp_size)


def read_sizes(config: Mapping[str, Any], where: str = "config.json") -> ModelSizes:
    """The sizes in a Hugging Face config.json.

    Args: where: names the file in errors.
    Raises: ConfigError naming a field that is missing or not a positive number, or a quantisation that is not read.
    """
    fp8_block(config, where)  # whatever a model is stored in, it is loaded in bfloat16
    text = language_model(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")

    def number(*names: str, otherwise: int | None = None, least: int = 1) -> int:
        for name in names:
            value = text.get(name)
            if value is None:
                continue
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"{where}: {name} is {value!r}, expected a whole number, at least {least}. "
                    "Is it the config.json of a Hugging Face language model?"
                )
            return value
        if otherwise is None:
            raise ConfigError(
                f"{where} has no {' or '.join(names)}, so its size cannot be planned. "
                "Is it the config.json of a Hugging Face language model?"
            )
        return otherwise

    num_layers, hidden, heads = number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")
    num_experts = number(*NUM_EXPERTS_KEYS, otherwise=0, least=0)
    expert_ffn = number("moe_intermediate_size", "intermediate_size") if num_experts else 0
    num_dense_layers = num_layers
    if num_experts:
        step, first = number("decoder_sparse_step", otherwise=1), number("first_k_dense_replace", otherwise=0, least=0)
        num_dense_layers = _num_dense_layers(num_layers, step, first, text.get("mlp_only_layers") or ())
    latent = None
    if "kv_lora_rank" in text:
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        latent = LatentSizes(number("q_lora_rank", otherwise=0, least=0), *(number(name) for name in names))
    return ModelSizes(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_size=number("intermediate_size", least=min(1, num_dense_layers)),
        num_heads=heads,
        num_kv_heads=heads if latent else number("num_key_value_heads", otherwise=heads),
        head_dim=latent.nope_dim + latent.rope_dim if latent else number("head_dim", otherwise=hidden // heads),
        vocab_size=number("vocab_size"),
        max_context=number("max_position_embeddings"),
        tied_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        qkv_bias=model_type == "qwen2" or bool(text.get("attention_bias", model_type == "gpt_oss")),
        out_bias=bool(text.get("attention_bias", model_type == "gpt_oss")),
        sinks=model_type == "gpt_oss",
        expert_bias=model_type == "gpt_oss",
        # DeepSeek's; Qwen's shared expert (shared_expert_intermediate_size) belongs to families that are refused.
        shared_ffn_size=number("n_shared_experts", otherwise=0, least=0) * expert_ffn,
        latent=latent,
        qk_norm=model_type.startswith("qwen3"),
        num_experts=num_experts,
        experts_per_token=number("num_experts_per_tok") if num_experts else 0,
        expert_ffn_size=expert_ffn,
        num_dense_layers=num_dense_layers,
    )


def base_parameters(sizes: ModelSizes, split: Split) -> dict[str, int]:
    """Frozen weights of one rank, by part; at least those of the fullest pipeline stage.

    Megatron's rule: q, k, v, gate, up, embedding and unembedding by rows, o and down by columns over TP; whole experts
    over EP; equal numbers of layers over PP, or one more; norms and router on every rank.
    """
    hidden, tp = sizes.hidden_size, split.tp_size
    layers = split.stage_layers(sizes)
    dense, expert = _stage_layers(sizes, split)
    q, kv = sizes.q_size // tp, split.kv_heads(sizes) * sizes.head_dim
    attention = hidden * (2 * q + 2 * kv) + (q + 2 * kv if sizes.qkv_bias else 0)
    attention += (hidden if sizes.out_bias else 0) + (sizes.num_heads // tp if sizes.sinks else 0)
    norms = 2 * hidden + (2 * sizes.head_dim if sizes.qk_norm else 0)
    if sizes.latent is not None:
        attention = sum(a * b for a, b in sizes.latent.matrices(hidden, sizes.num_heads // tp))
        norms += sizes.latent.q_rank + sizes.latent.kv_rank
    per_expert = 3 * hidden * sizes.expert_ffn_size
    per_expert += 2 * sizes.expert_ffn_size + hidden if sizes.expert_bias else 0
    table = split.vocab_rows(sizes) * hidden
    tables = 1 if split.pp_size > 1 or sizes.tied_embeddings else 2
    return {
        "attention": layers * attention,
        "mlp": 3 * hidden * (dense * sizes.ffn_size + expert * sizes.shared_ffn_size) // tp,
        "experts": expert * (sizes.num_experts // split.ep_size) * per_expert,
        # A bias on the logits (gpt-oss), or one beside the scores (DeepSeek).
        "router": expert * sizes.num_experts * (hidden + (sizes.expert_bias or sizes.latent is not None)),
        "norms": layers * norms + hidden,
        "embeddings": tables * table,
    }


def adapter_parameters(
    sizes: ModelSizes,
    split: Split,
    rank: int,
    *,
    train_attn: bool = True,
    train_mlp: bool = True,
    train_unembed: bool = True,
    per_expert: bool = False,
) -> dict[str, int]:
    """Trainable numbers of one rank for an adapter of LoRA rank `rank`, by part; for the fullest pipeline stage.

    A of a column-parallel matrix and B of a row-parallel one are on every TP rank, B of k and v by heads. Experts are
    "shared-outer": the factor that touches the hidden dimension is one for all experts of a matrix, the other is each
    expert's own; with `per_expert` both are.
    With every size 1 this is the published count (Tinker's and the cookbook's table).
    """
    hidden, tp = sizes.hidden_size, split.tp_size
    q, kv = sizes.q_size // tp, split.kv_heads(sizes) * sizes.head_dim
    layers = split.stage_layers(sizes)
    dense, expert = _stage_layers(sizes, split)
    attention = (3 * hidden + q + 2 * kv) + (q + hidden)
    if sizes.latent is not None:
        attention = sum(a + b for a, b in sizes.latent.matrices(hidden, sizes.num_heads // tp))
    mlp = 3 * (hidden + sizes.ffn_size // tp)
    held = sizes.num_experts // split.ep_size
    experts = 3 * (held * hidden if per_expert else hidden) + 3 * held * sizes.expert_ffn_size
    if sizes.shared_ffn_size:
        experts += 3 * (hidden + sizes.shared_ffn_size // tp)
    return {
        "attention": rank * layers * attention * train_attn,
        "mlp": rank * (dense * mlp + expert * experts) * train_mlp,
        "unembed": rank * (hidden + split.vocab_rows(sizes)) * train_unembed,
    }


def _stage_layers(sizes: ModelSizes, split: Split) -> tuple[int, int]:
    """Dense and expert layers of a pipeline stage: as many expert layers as a stage can have."""
    layers = split.stage_layers(sizes)
    expert = min(layers, sizes.num_expert_layers)
    return layers - expert, expert


def _num_dense_layers(num_layers: int, step: int, first: int, only_dense: Sequence[int]) -> int:
    """Layers without experts, as transformers' Qwen-MoE (decoder_sparse_step, mlp_only_layers) and DeepSeek
    (first_k_dense_replace) configurations say."""
    sparse = [i for i in range(num_layers) if i not in only_dense and (i + 1) % step == 0 and i >= first]
    return num_layers - len(sparse)
