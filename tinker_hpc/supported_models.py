"""Which base models are run: the families, and the switches of a config.json that nobody implements (pure, no torch).

One list for both ends: `plan` and every submission refuse by it before a job queues (resources.py), the worker by the
same before it loads anything (megatron_adapters/families, where each family has the file of its name).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinker_hpc.errors import ConfigError

FAMILIES: dict[str, tuple[str, ...]] = {
    "deepseek_v3": (),
    "gpt_oss": ("attention_bias",),
    "llama": (),
    "qwen2": (),
    "qwen3": (),
    "qwen3_moe": (),
}
"""model_type of config.json -> the switches that the family reads itself, and that are refused elsewhere"""

_HYBRID = (
    "most layers of Qwen3-Next and Qwen3.5/3.6 are gated delta nets, which megatron-core 0.16.1 runs with "
    "flash-linear-attention alone (CUDA) and not on packed sequences."
)
NOT_CARRIED = {name: _HYBRID for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")}
"""model_type -> why not"""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on the length of the sequence at hand."""


def check_supported(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model that would be built wrongly or not at all; better than wrong numbers.

    Args:
        config: config.json as it is on disk, or as transformers completes it.
        where: names the file in errors.
    Raises: ConfigError naming the family or switch, and what is supported.
    """
    model_type = config.get("model_type")
    if model_type in NOT_CARRIED:
        raise ConfigError(
            f"{where} says model_type {model_type!r}: {NOT_CARRIED[model_type]} Choose another base model."
        )
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{where} says model_type {model_type!r}, which is not supported. "
            f"Supported: {', '.join(sorted(FAMILIES))}. Choose a base model of one of these."
        )
    problems = _not_implemented(config, knows=FAMILIES[model_type])
    if problems:
        raise ConfigError(
            f"{where}: this {model_type} model uses {'; '.join(problems)}, which is not implemented. "
            "Choose another base model."
        )


def _not_implemented(config: Mapping[str, Any], *, knows: tuple[str, ...]) -> list[str]:
    problems = []
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r} (only silu)")
    for switch in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(switch) and switch not in knows:
            problems.append(f"{switch} true")
    # As transformers reads it: rope_scaling and its `type` are the names before version 5.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        problems.append(f"rope_type {rope_type!r} (only {', '.join(ROPE_TYPES)})")
    return problems
