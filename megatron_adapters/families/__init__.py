"""The model families we run: a Hugging Face config.json becomes an `Architecture`, the only model facts others read.

One file a family, called like its model_type and listed in tinker_hpc/supported_models.py, which the client side reads
too; docs/families.md walks through a new one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tinker_hpc import supported_models
from tinker_hpc.errors import ConfigError
from tinker_hpc.model_config import checked

from .architecture import Architecture, Experts, as_ids
from .layouts import check_layout

__all__ = ["FAMILIES", "Architecture", "Experts", "architecture", "check_layout", "read_architecture", "read_hf_config"]

FAMILIES = {model_type: import_module(f".{model_type}", __name__) for model_type in supported_models.FAMILIES}
"""model_type of config.json -> its module"""


def read_hf_config(folder: Path) -> Any:
    """The transformers configuration in `folder`, refused early where we could not run the model.

    Raises: ConfigError if there is none or the model is not supported.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"no readable config.json in {folder} ({error.strerror}). Give the folder of a Hugging Face model."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). Download the model again.") from error
    supported_models.check_supported(checked(config, str(path)), str(path))
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
