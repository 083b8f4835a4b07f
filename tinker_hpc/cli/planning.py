"""`plan`: the layout of a model on so many GPUs, the memory of a rank, and whether it fits. Nothing is submitted."""

from __future__ import annotations

import math
from dataclasses import replace

import click

from launch.memory_model import GIB, MARGIN
from launch.plan import Plan
from tinker_hpc.cli.options import json_option, plan_options
from tinker_hpc.cli.output import emit, fields, table
from tinker_hpc.errors import ConfigError
from tinker_hpc.resources import Resources, has_slices, known_gpu_memory_gib, plan_for, rank_memory_gib


@click.command()
@click.option("--base-model", required=True, metavar="M", help="Hub name or folder; only its config.json is read.")
@click.option("--cluster", metavar="C", help="Profile of the configuration, for what is not given here.")
@click.option("--gpu-memory", type=float, metavar="GIB", help="Of one GPU, e.g. 80 (the profile's).")
@click.option("--lora-rank", type=click.IntRange(1), default=32, metavar="N", help="Rank of the adapters (32).")
@click.option("--adapters", type=click.IntRange(1), default=1, metavar="N", help="Adapters trained at a time (1).")
@plan_options
@json_option
def plan(
    *,
    base_model: str,
    cluster: str | None,
    gpu_memory: float | None,
    lora_rank: int,
    adapters: int,
    resources: Resources,
    as_json: bool,
) -> None:
    """Say which layout a model would get and whether it fits.

    Memory is estimated for the fullest rank. No weights are read.
    """
    from launch.plan import Machine
    from tinker_hpc.base_models import resolve
    from tinker_hpc.config import load_config

    config = load_config()
    profile = config.profile(cluster)
    nodes = resources.nodes or 1
    gpus_per_node = profile.default_gpus_per_node if resources.gpus_per_node is None else resources.gpus_per_node
    ranks_per_node = resources.ranks_per_node or gpus_per_node or 1
    _check_memory(gpus_per_node, gpu_memory, resources.memory)
    memory = resources.memory or profile.memory
    known = rank_memory_gib(profile, gpus_per_node, ranks_per_node, memory)
    machine = Machine(
        nodes,
        ranks_per_node,
        known if gpu_memory is None else gpu_memory,
        on_gpu=gpus_per_node > 0,
        sliced=gpus_per_node > 0 and gpu_memory is None and has_slices(profile),  # else another GPU is asked about
    )
    model = resolve(base_model, config.base_models, weights=False)
    per_expert = config.expert_lora == "per_expert"
    made = plan_for(
        model,
        machine,
        tp_size=resources.tp_size,
        pp_size=resources.pp_size,
        ep_size=resources.ep_size,
        lora_rank=lora_rank,
        num_adapters=adapters,
        per_expert=per_expert,
    )
    if gpus_per_node and gpu_memory is None and known_gpu_memory_gib(profile) is None:
        made = replace(
            made,
            reasons=(
                *made.reasons,
                f"How much memory a GPU has is not known: {known:g} GiB are assumed. Give --gpu-memory, or set "
                f"gpu_memory_gib in [clusters.{profile.name}] of the configuration.",
            ),
        )
    if not gpus_per_node and not made.fits and memory is not None and memory.isdigit() and int(memory) < 1024:
        words = f"memory is {memory!r}, which is {memory} MiB (Slurm's unit): write {memory}G for GiB."
        made = replace(made, reasons=(*made.reasons, words))
    if as_json:
        emit({"base_model": model.name, "nodes": nodes, "ranks_per_node": ranks_per_node, **made.to_json()})
        return
    _show(made)


def _check_memory(gpus_per_node: int, gpu_memory: float | None, memory: str | None) -> None:
    """Refuses what would play no part in the plan, and what is no size. Raises: ConfigError."""
    if gpu_memory is not None and not gpus_per_node:
        raise ConfigError(
            f"--gpu-memory is {gpu_memory:g}, but the plan is for nodes without GPUs (--gpus-per-node 0, or the "
            "cluster's profile). Give the number of GPUs, or in its place --memory, that of each node."
        )
    if memory is not None and gpus_per_node:
        raise ConfigError(
            f"--memory is {memory!r}, but the plan is for {gpus_per_node} GPU(s) on a node, whose own memory counts. "
            "Leave it out, give --gpu-memory in its place, or --gpus-per-node 0 for nodes without GPUs."
        )
    if gpu_memory is not None and not 1 <= gpu_memory < math.inf:  # nor NaN
        raise ConfigError(f"--gpu-memory is {gpu_memory:g}; it must be a number of GiB of at least 1, for example 80.")


def _show(made: Plan) -> None:
    sizes = f"tp {made.tp_size}, ep {made.ep_size}, pp {made.pp_size}, dp {made.dp_size}, {made.dtype}"
    known = made.capacity_known
    shown = {"layout": sizes, "fits": ("yes" if made.fits else "no") if known else "not known"}
    if made.fits:
        copies = f" in each of {made.dp_size} data parallel copies" if made.dp_size > 1 else ""
        shown |= {
            "micro-batch": f"{made.token_budget} tokens",
            "longest sequence": f"{made.longest_sequence} tokens in training" if known else None,
            "activations": "computed again in the backward" if made.recompute else "kept for the backward",
            "KV cache": f"{made.cache_tokens} tokens of samples under way{copies}" if known else None,
        }
    fields(shown)
    click.echo()
    held = made.memory
    rows = [
        ("weights", held.weights, ""),
        ("adapters", held.adapters, "with gradients and Adam moments"),
        ("snapshots", held.snapshots, "of adapters, for sampling"),
        ("activations", held.activations, f"of {'a' if made.fits else 'the smallest'} micro-batch"),
        ("KV cache", held.cache, "in the room of the activations, while none are held: the larger of the two counts"),
        ("workspace", held.workspace, "process, communication, logits, one layer at work"),
        ("total", held.total, f"of {made.capacity / GIB:g} GiB, {MARGIN:.0%} of which stay free"),
    ]
    left_out = () if known and made.fits else ("KV cache",) if known else ("snapshots", "KV cache", "total")
    rows = [row for row in rows if row[0] not in left_out]
    table(("A RANK HOLDS", "GIB", ""), [(name, f"{size / GIB:.2f}", words) for name, size, words in rows])
    click.echo()
    for reason in made.reasons:
        click.echo(reason)
