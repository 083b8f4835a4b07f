"""Random tiny Hugging Face folders of the families whose numbers must equal transformers: made in a second, any seed.

    folder = random_models.make("llama", tmp_path)      # also "qwen2", "qwen3", "qwen3_moe"

Each keeps the trait that sets its family apart: Llama 3's scaled rope (with positions beyond the original context),
Qwen2's q, k and v biases and tied embeddings, Qwen3's q and k norms and a head size that is not hidden / heads, and of
Qwen3-MoE the experts.
Heads and widths divide by TP 4. Norms and biases are random too: left at their initial 1 and 0, a model that forgets
them would pass. No tokenizer; `tiny-qwen3` next door is the trained model, with one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,  # large enough that attention is far from uniform and logits far from zero
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model of the family with random weights; `overrides` replace fields of its configuration."""
    torch.manual_seed(seed)
    fields = COMMON | overrides
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**({"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE} | fields))
        )
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**({"tie_word_embeddings": True} | fields)))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**({"tie_word_embeddings": False, "head_dim": 16} | fields)))
    elif family == "qwen3_moe":
        more = EXPERTS | {"tie_word_embeddings": False, "head_dim": 16, "num_hidden_layers": 4}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(fields | more | overrides)))
    else:
        raise ValueError(f"unknown family {family!r}: expected llama, qwen2, qwen3 or qwen3_moe")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "norm" in name else 0.0
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
    return model.eval()


def make(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write such a model (config.json, model.safetensors in float32) under `folder` and return its path."""
    path = folder / f"random-{family}-{seed}"
    build(family, seed, **overrides).save_pretrained(path)
    return path
