"""Which layouts an architecture can run under."""

from __future__ import annotations

from tinker_hpc.errors import ConfigError

from ..interface import Layout
from .architecture import Architecture


def check_layout(arch: Architecture, layout: Layout) -> None:
    """Refuse a layout that does not divide the model.

    Raises: ConfigError naming the sizes that work.
    """
    for name in ("tp_size", "dp_size", "pp_size", "ep_size"):
        if getattr(layout, name) < 1:
            raise ConfigError(f"{name} is {getattr(layout, name)}; it must be at least 1.")
    _check_tp(arch, layout.tp_size)
    if arch.num_layers % layout.pp_size:
        raise ConfigError(
            f"pp_size {layout.pp_size} does not divide the {arch.num_layers} layers of this {arch.model_type} model. "
            f"Sizes that work: {_divisors(arch.num_layers)}."
        )
    if layout.ep_size == 1:
        return
    if arch.experts is None:
        raise ConfigError(
            f"ep_size is {layout.ep_size}, but this {arch.model_type} model has no experts. Use ep_size 1; its ranks "
            "can serve as dp_size or tp_size."
        )
    if arch.experts.count % layout.ep_size:
        raise ConfigError(
            f"ep_size {layout.ep_size} does not divide num_experts ({arch.experts.count}) of this {arch.model_type} "
            f"model. Sizes that work: {_divisors(arch.experts.count)}."
        )
    stage_size = layout.tp_size * layout.dp_size
    if stage_size % layout.ep_size:
        raise ConfigError(
            f"ep_size {layout.ep_size} does not divide tp_size {layout.tp_size} * dp_size {layout.dp_size} = "
            f"{stage_size}, the ranks of a stage over which experts are spread. Sizes that work: "
            f"{_divisors(stage_size)}."
        )


def _check_tp(arch: Architecture, tp_size: int) -> None:
    sizes = {
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "intermediate_size": arch.ffn_size,
        "vocab_size": arch.vocab_size,
    }
    if len(arch.expert_layers) == arch.num_layers:
        del sizes["intermediate_size"]  # experts are never split over TP
    misfits = [f"{name} ({size})" for name, size in sizes.items() if size % tp_size]
    if misfits:
        allowed = [n for n in range(1, arch.num_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
        raise ConfigError(
            f"tp_size {tp_size} does not divide {', '.join(misfits)} of this {arch.model_type} model. "
            f"Sizes that work: {', '.join(map(str, allowed))}."
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
