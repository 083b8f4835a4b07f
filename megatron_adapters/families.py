"""The model families we run: a Hugging Face config.json becomes an `Architecture`, the only model facts others read.

Llama 3.x, Qwen2.5 and Qwen3 (dense) differ in three switches: bias on q, k, v; norms on q and k; tied embeddings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_hpc.errors import ConfigError

from .interface import Layout


@dataclass(frozen=True)
class Family:
    """What all models of one `model_type` share."""

    qkv_bias: bool
    qk_norm: bool


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias=False, qk_norm=False),
    "qwen2": Family(qkv_bias=True, qk_norm=False),
    "qwen3": Family(qkv_bias=False, qk_norm=True),
}

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on the length of the sequence at hand."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one dense decoder. Widths count elements; all before any sharding."""

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

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_hf_config(folder: Path) -> Any:
    """The transformers configuration in `folder`, refused early where we could not run the model.

    Raises: ConfigError if there is none or the model type is not supported.
    """
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except OSError as error:
        raise ConfigError(
            f"no readable config.json in {folder} ({error.strerror}). Give the folder of a Hugging Face model."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). Download the model again.") from error
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{path} says model_type {model_type!r}, which is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))} (dense). Choose a base model of one of these."
        )
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def architecture(hf_config: Any, eos_token_ids: tuple[int, ...] = ()) -> Architecture:
    """Read the sizes out of a transformers configuration.

    Raises: ConfigError for a switch we do not implement; better than wrong numbers.
    """
    family = FAMILIES[hf_config.model_type]
    _refuse_unsupported(hf_config)
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return Architecture(
        model_type=hf_config.model_type,
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_size=hf_config.intermediate_size,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=hf_config.vocab_size,
        max_context=hf_config.max_position_embeddings,
        norm_eps=hf_config.rms_norm_eps,
        tied_embeddings=bool(hf_config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        eos_token_ids=eos_token_ids or _as_ids(getattr(hf_config, "eos_token_id", None)),
    )


def read_architecture(folder: Path) -> tuple[Architecture, Any]:
    """The architecture of the model in `folder`, and the transformers configuration it came from."""
    hf_config = read_hf_config(folder)
    return architecture(hf_config, _generation_eos(folder)), hf_config


def check_layout(arch: Architecture, layout: Layout) -> None:
    """Refuse a tensor-parallel size that does not divide the model.

    Raises: ConfigError naming the sizes that work.
    """
    sizes = {
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "intermediate_size": arch.ffn_size,
        "vocab_size": arch.vocab_size,
    }
    if layout.tp_size < 1 or layout.dp_size < 1:
        raise ConfigError(f"tp_size {layout.tp_size} and dp_size {layout.dp_size} must both be at least 1.")
    misfits = [f"{name} ({size})" for name, size in sizes.items() if size % layout.tp_size]
    if misfits:
        allowed = [n for n in range(1, arch.num_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
        raise ConfigError(
            f"tp_size {layout.tp_size} does not divide {', '.join(misfits)} of this {arch.model_type} model. "
            f"Sizes that work: {', '.join(map(str, allowed))}."
        )


def _refuse_unsupported(hf_config: Any) -> None:
    rope = getattr(hf_config, "rope_parameters", None) or {}
    problems = []
    if getattr(hf_config, "hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {hf_config.hidden_act!r} (only silu)")
    if getattr(hf_config, "attention_bias", False):
        problems.append("attention_bias true")
    if getattr(hf_config, "mlp_bias", False):
        problems.append("mlp_bias true")
    if getattr(hf_config, "use_sliding_window", False):
        problems.append("use_sliding_window true")
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        problems.append(f"rope_type {rope['rope_type']!r} (only {', '.join(ROPE_TYPES)})")
    if problems:
        raise ConfigError(
            f"this {hf_config.model_type} model uses {'; '.join(problems)}, which is not implemented. "
            "Choose another base model."
        )


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """Chat models list their end-of-turn tokens in generation_config.json, often more than config.json does."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    return _as_ids(json.loads(path.read_text()).get("eos_token_id"))


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
