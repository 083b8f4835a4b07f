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
    if layout.pp_size > arch.num_layers:
        raise ConfigError(
            f"pp_size {layout.pp_size} is more than the {arch.num_layers} layers of this {arch.model_type} model. "
            f"Use at most {arch.num_layers}, so that every stage has one."
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
    misfits = _misfits(arch, tp_size)
    if misfits:
        allowed = [n for n in range(1, arch.num_heads + 1) if not _misfits(arch, n)]
        raise ConfigError(
            f"tp_size {tp_size} does not divide {', '.join(misfits)} of this {arch.model_type} model. "
            f"Sizes that work: {', '.join(map(str, allowed))}."
        )


def _misfits(arch: Architecture, tp_size: int) -> list[str]:
    """Sizes that TP cannot cut, by their names in config.json.

    More ranks than key-value heads hold copies of them; a vocabulary is padded, but no rank may have padding alone.
    """
    sizes = {"num_attention_heads": arch.num_heads}
    if len(arch.expert_layers) < arch.num_layers:  # experts are never split over TP
        sizes["intermediate_size"] = arch.ffn_size
    if arch.experts is not None and arch.experts.shared_ffn_size:
        sizes["moe_intermediate_size * n_shared_experts"] = arch.experts.shared_ffn_size
    misfits = [f"{name} ({size})" for name, size in sizes.items() if size % tp_size]
    if arch.num_kv_heads % tp_size and tp_size % arch.num_kv_heads:
        misfits.append(f"num_key_value_heads ({arch.num_kv_heads})")
    if (tp_size - 1) * -(-arch.vocab_size // tp_size) >= arch.vocab_size:
        misfits.append(f"vocab_size ({arch.vocab_size})")
    return misfits


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
