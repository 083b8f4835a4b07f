"""The independent side of the parity tests: tiny random models in transformers + peft, one process, float32, eager.

Everything here is made from seeds and written into a folder, so that ranks of any layout compare with the same bits.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft_stacks import PeftParameters, random_adapter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LENGTHS = (17, 9, 31, 6)  # 63 tokens: odd, so tensor parallelism has to pad
VOCAB = 128
RANK = 8
ADAM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.1, "grad_clip_norm": 1.0}
STEPS = 5
ADAPTER_FILE = "adapter_model.safetensors"
MLP_TARGETS = ["gate_proj", "up_proj", "down_proj"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "eos_token_id": 2,
}
# Scaling that bites within 31 tokens: the original context is 16.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
# What no size of 2 divides: one key-value head, of which ranks hold copies; a padded vocabulary; unequal stages.
_INDIVISIBLE: dict[str, Any] = {"num_key_value_heads": 1, "vocab_size": 131, "num_hidden_layers": 5}
# Sinks, a window shorter than the sequences in every second layer, biases everywhere, a clamp that bites; at 1.0 it
# bites so often that rounding puts elements on its other side, whose derivatives then differ, within five steps.
_GPT_OSS: dict[str, Any] = {
    "intermediate_size": 96,  # of an expert; MXFP4 wants a multiple of 32
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "sliding_window": 7,
    "swiglu_limit": 2.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}
# Latent attention with YaRN's mscale, a dense layer first, two groups of experts closed, one shared expert.
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_mtp_layers": 0,
    "rope_parameters": _GPT_OSS["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 0.8},
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**(_SIZES | _INDIVISIBLE), tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=False),
    "qwen3_bf16": lambda: Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, norm_topk_prob=True, decoder_sparse_step=1),
    # Weights that are not scaled to sum to 1, and A and B of its own for every expert.
    "qwen3_moe_per_expert": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, norm_topk_prob=False, decoder_sparse_step=1),
    "gpt_oss": lambda: GptOssConfig(**(_SIZES | _GPT_OSS)),
    "deepseek_v3": lambda: DeepseekV3Config(**(_SIZES | _DEEPSEEK)),
}
LINEARS = {
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP_TARGETS, "lm_head"],
}
"""Of the families whose experts peft adapts as parameters only (target_parameters): what it adapts beside them."""
EXPERTS = (*(name for name in CONFIGS if "moe" in name), *LINEARS)
DENSE = tuple(name for name in CONFIGS if name not in EXPERTS)


@dataclass(frozen=True)
class Sequence:
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Reference:
    """What transformers + peft compute. Gradients and logits by PEFT key and by sequence."""

    family: str
    model_folder: Path
    adapter_folder: Path
    base_logits: list[torch.Tensor]
    """without the adapter"""
    logits: list[torch.Tensor]
    grads: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]


def sequences(seed: int = 7) -> list[Sequence]:
    """The common batch. The first tokens of each sequence have weight 0, as a prompt's have."""
    random = np.random.default_rng(seed)
    batch = []
    for n in LENGTHS:
        weights = random.uniform(0.5, 1.5, n).astype(np.float32)
        weights[:2] = 0.0
        batch.append(Sequence(random.integers(0, VOCAB, n, dtype=np.int32), random.integers(0, VOCAB, n), weights))
    return batch


def build(family: str, folder: Path) -> Reference:
    """Make the model and an adapter with non-zero B in `folder`, and compute the reference numbers."""
    from peft import LoraConfig, get_peft_model

    model_folder, adapter_folder = folder / "model", folder / "adapter"
    _save_random_model(family, model_folder)
    if family in LINEARS:
        return _reference(family, folder, *_with_parameters(family, model_folder, adapter_folder))
    targets = [name for name in TARGETS if family in DENSE or name not in MLP_TARGETS]
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about tied embeddings; the numbers are what we want
        model = get_peft_model(load_transformers(model_folder), config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(str(adapter_folder), save_embedding_layers=False)
    num_experts, shared = getattr(model.config, "num_experts", 0), family == "qwen3_moe"
    if num_experts:
        model = _with_experts(model_folder, adapter_folder, generator, shared=shared)
    return _reference(family, folder, model, PeftParameters(model, num_experts, shared=shared))


def _reference(family: str, folder: Path, model: Any, parameters: PeftParameters) -> Reference:
    base = load_transformers(folder / "model")
    base_logits, logits = ([logits_of(m, sequence.tokens) for sequence in sequences()] for m in (base, model))
    _loss(model).backward()
    grads = parameters.grads()
    losses, norms = _train(model, parameters)
    return Reference(family, folder / "model", folder / "adapter", base_logits, logits, grads, losses, norms)


def _with_parameters(family: str, model_folder: Path, adapter_folder: Path) -> tuple[Any, PeftParameters]:
    """peft on the attention's linears and on the experts' fused parameters; the same matrices, shared-outer, in
    `adapter_folder` by the names Tinker gives them.
    """
    model, parameters = peft_on_parameters(family, model_folder)
    generator = torch.Generator().manual_seed(11)
    parameters.write({key: torch.randn(x.shape, generator=generator) * 0.05 for key, x in parameters.values().items()})
    adapter_folder.mkdir()
    save_file({key: x.contiguous() for key, x in parameters.values().items()}, adapter_folder / ADAPTER_FILE)
    saved = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": [*LINEARS[family], *MLP_TARGETS]}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(saved))
    return model, parameters


def peft_on_parameters(family: str, model_folder: Path) -> tuple[Any, PeftParameters]:
    """A PeftModel whose adapter is zero, and its matrices by canonical name."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import transformers_weight_conversion

    # peft would read the names of the dense and the shared MLPs' linears as those of the experts' parameters.
    transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN.pop("deepseek_v3", None)
    base = load_transformers(model_folder)
    fused = r".*\.gate_up_proj"
    config = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=LINEARS[family],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={fused: 2 * RANK},
        alpha_pattern={fused: 64},
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    parameters = PeftParameters(model, base.config.num_local_experts, shared=True, interleaved=family == "gpt_oss")
    with torch.no_grad():
        for parameter in parameters.parameters.values():
            parameter.zero_()  # gate's and up's halves have nothing of each other
    return model, parameters


def _with_experts(model_folder: Path, adapter_folder: Path, generator: torch.Generator, *, shared: bool) -> Any:
    """Add a pair of matrices for each expert to the saved adapter, as published adapters hold them, and load it."""
    from peft import PeftModel

    base = load_transformers(model_folder)
    tensors = load_file(adapter_folder / "adapter_model.safetensors")
    tensors |= random_adapter(base, RANK, base.config.num_experts, generator, shared=shared)
    config = json.loads((adapter_folder / "adapter_config.json").read_text()) | {"target_modules": TARGETS}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(config))
    metadata = {"format": "pt"} | ({"expert_lora": "shared_outer"} if shared else {})
    save_file(tensors, adapter_folder / "adapter_model.safetensors", metadata=metadata)
    return PeftModel.from_pretrained(base, str(adapter_folder), is_trainable=True)


def load_transformers(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)


def logits_of(model: Any, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]


def _loss(model: Any) -> torch.Tensor:
    total = torch.zeros(())
    for sequence in sequences():
        logits = model(torch.from_numpy(sequence.tokens.astype(np.int64))[None]).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, torch.from_numpy(sequence.targets)[:, None])[:, 0]
        total = total - (logprobs * torch.from_numpy(sequence.weights)).sum()
    return total


def _train(model: Any, parameters: PeftParameters) -> tuple[list[float], list[float]]:
    """STEPS steps of torch's AdamW with its global-norm clipping, from zero gradients.

    On copies of the parameters, so that a factor that experts share is stepped (and clipped) once.
    """
    values = {name: torch.nn.Parameter(value) for name, value in parameters.values().items()}
    optimizer = torch.optim.AdamW(
        values.values(),
        lr=ADAM["learning_rate"],
        betas=(ADAM["beta1"], ADAM["beta2"]),
        eps=ADAM["eps"],
        weight_decay=ADAM["weight_decay"],
    )
    losses, norms = [], []
    for _ in range(STEPS):
        parameters.zero_grad()
        loss = _loss(model)
        loss.backward()
        for name, grad in parameters.grads().items():
            values[name].grad = grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(values.values(), ADAM["grad_clip_norm"])))
        optimizer.step()
        parameters.write(values)
        losses.append(float(loss.detach()))
    return losses, norms


def _save_random_model(family: str, folder: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are initialised to one and biases to zero, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("_bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    if family.endswith("_bf16"):
        model = model.to(torch.bfloat16)
    # Several files and an index, as large models have them.
    model.save_pretrained(folder, max_shard_size="100KB" if family == "llama" else "50MB")
