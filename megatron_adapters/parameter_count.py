"""Trainable parameters: the matrices that we make against the closed formula of Tinker's table. At start, and for
every adapter as it was built.
"""

from __future__ import annotations

from math import prod

from tinker_hpc.errors import WeightsError

from .families import Architecture
from .interface import Layout
from .placement import stage_layers
from .projections import attention_names, parameters_per_rank, projections, target_names

PARTS = ("train_attn", "train_mlp", "train_unembed")


def check_count(
    arch: Architecture,
    layout: Layout,
    rank: int,
    switches: dict[str, bool],
    *,
    per_expert: bool,
    built: tuple[int, int] | None = None,
) -> None:
    """Count the matrices of all stages.

    Args: switches: PARTS. built: a pipeline stage, and how many parameters its adapter has as it was built.
    Raises: WeightsError where the formula says another number. Collectives: none.
    """
    targets = target_names(**switches, attention=attention_names(arch))
    found = 0
    for pp_rank in range(layout.pp_size):
        if built is not None and pp_rank == built[0]:
            found += built[1]
            continue
        layers = stage_layers(arch.num_layers, layout, pp_rank)
        wanted = projections(arch, targets, per_expert=per_expert, layers=layers)
        found += sum(prod(p.shape_a(rank)) + prod(p.shape_b(rank)) for p in wanted)
    expected = rank * parameters_per_rank(arch, **switches, per_expert=per_expert)
    if found != expected:
        parts = ", ".join(name for name, on in switches.items() if on)
        raise WeightsError(
            f"an adapter of rank {rank} ({parts}) has {found} trainable parameters, the formula says {expected}. This "
            "is a bug of tinker_hpc; please report the base model and layout."
        )


def check_counts(arch: Architecture, layout: Layout) -> None:
    """Of each part by itself, before a model is loaded. Raises: WeightsError."""
    for per_expert in (False, True) if arch.experts is not None else (False,):
        for part in PARTS:
            check_count(arch, layout, 1, {name: name == part for name in PARTS}, per_expert=per_expert)
