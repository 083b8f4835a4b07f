"""The model families we run: a Hugging Face config.json becomes an `Architecture`, the only model facts others read.

One file a family. A new one states its switches there and is listed in `FAMILIES`; docs/families.md walks through it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinker_hpc.errors import ConfigError

from . import deepseek_v3, gpt_oss, llama, qwen2, qwen3, qwen3_moe
from .architecture import Architecture, Experts, as_ids
from .layouts import check_layout

__all__ = ["FAMILIES", "Architecture", "Experts", "architecture", "check_layout", "read_architecture", "read_hf_config"]

FAMILIES = {family.MODEL_TYPE: family for family in (deepseek_v3, gpt_oss, llama, qwen2, qwen3, qwen3_moe)}
"""model_type of config.json -> its module"""


_HYBRID = (
    "most layers of Qwen3-Next and Qwen3.5/3.6 are gated delta nets, which megatron-core 0.16.1 runs with "
    "flash-linear-attention alone (CUDA) and not on packed sequences."
)
NOT_CARRIED = {name: _HYBRID for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")}
"""model_type -> why not"""


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
    if model_type in NOT_CARRIED:
        raise ConfigError(
            f"{path} says model_type {model_type!r}: {NOT_CARRIED[model_type]} Choose another base model."
        )
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{path} says model_type {model_type!r}, which is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}. Choose a base model of one of these."
        )
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def architecture(hf_config: Any) -> Architecture:
    """Read the sizes out of a transformers configuration.

    Raises: ConfigError for a switch we do not implement; better than wrong numbers.
    """
    return FAMILIES[hf_config.model_type].architecture(hf_config)


def read_architecture(folder: Path) -> tuple[Architecture, Any]:
    """The architecture of the model in `folder`, and the transformers configuration it came from."""
    hf_config = read_hf_config(folder)
    arch = architecture(hf_config)
    return replace(arch, eos_token_ids=_generation_eos(folder) or arch.eos_token_ids), hf_config


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """Chat models list their end-of-turn tokens in generation_config.json, often more than config.json does."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    return as_ids(json.loads(path.read_text()).get("eos_token_id"))
