"""config.json of a Hugging Face model: that it is what its readers take it for, and where in it the language model is.

Pure. Sizes are launch/model_sizes.py's, switches supported_models.py's; here is only what would make either of them, or
transformers, fail without a word about the file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from tinker_hpc.errors import ConfigError

NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What families call the number of a layer's experts."""

_KINDS = {
    "model_type": "a string",
    "text_config": "an object",
    "quantization_config": "an object",
    "rope_parameters": "an object",
    "rope_scaling": "an object",
    "mlp_only_layers": "a list of whole numbers",
}
"""Field -> what it must be where it is there and not null."""


def checked(config: Any, where: str) -> dict[str, Any]:
    """The same config.json, once its fields are of the kinds that everybody reads them as.

    Args: config: what was parsed. where: names the file in errors.
    Raises: ConfigError naming the field, what it is and what was expected.
    """
    if not isinstance(config, dict):
        raise _wrong(f"{where} holds {reprlib.repr(config)}", "an object with fields")
    _check_kinds(config, where)
    _check_kinds(language_model(config), where)
    return config


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model; where there is more, it is in `text_config`."""
    return config.get("text_config") or config


def _check_kinds(fields: Mapping[str, Any], where: str) -> None:
    for field, kind in _KINDS.items():
        value = fields.get(field)
        if value is not None and _kind(value) != kind:
            raise _wrong(f"{where}: {field} is {reprlib.repr(value)}", kind)


def _kind(value: Any) -> str | None:
    """One of the kinds above; None for all others."""
    if isinstance(value, str):
        return "a string"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list) and all(type(entry) is int for entry in value):
        return "a list of whole numbers"
    return None


def _wrong(what: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{what}, expected {expected}. Is this the config.json of a Hugging Face language model? Download it again."
    )
