"""Random tiny Hugging Face folders of the families whose numbers must equal transformers: made in a second, any seed.

    folder = random_models.make("llama", tmp_path)      # also "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3"

Each keeps the trait that sets its family apart: Llama 3's scaled rope (with positions beyond the original context),
Qwen2's q, k and v biases and tied embeddings, Qwen3's q and k norms and a head size that is not hidden / heads, of
Qwen3-MoE the experts, gpt-oss's sinks and windows, DeepSeek-V3's latent attention and groups of experts.
Heads and widths divide by TP 4. Norms and biases are random too: left at their initial 1 and 0, a model that forgets
them would pass. No tokenizer; `tiny-qwen3` next door is the trained model, with one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
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
GPT_OSS: dict[str, Any] = {
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "tie_word_embeddings": False,
}
DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_mtp_layers": 0,
    "tie_word_embeddings": False,
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
    elif family == "gpt_oss":
        model = GptOssForCausalLM(GptOssConfig(**(fields | GPT_OSS | overrides)))
    elif family == "deepseek_v3":
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**(fields | DEEPSEEK | overrides)))
    else:
        raise ValueError(f"unknown family {family!r}; the docstring names them")
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("_bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 1 and "inv_freq" not in name:
                center = 1.0 if "norm" in name else 0.0
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
    return model.eval()


def make(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write such a model (config.json, model.safetensors in float32) under `folder` and return its path."""
    path = folder / f"random-{family}-{seed}"
    build(family, seed, **overrides).save_pretrained(path)
    return path
