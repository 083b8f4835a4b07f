"""What the user asked for, the cluster's profile and the model's config.json -> a job spec (pure).

Shared by submit(), session() and the command line, so that `--dry-run` prints exactly what a run would submit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from launch.job_spec import JobSpec, Layout
from tinker_hpc.base_models import BaseModel
from tinker_hpc.config import ClusterProfile, parse_time_limit_min
from tinker_hpc.errors import ConfigError

# Half of a 48 GiB card: the other half is for activations, adapters, optimizer state and the KV cache.
MAX_WEIGHTS_GIB_PER_GPU = 24.0
CPUS_PER_GPU = 4


@dataclass(frozen=True)
class Resources:
    """The sizes of a job, as the user wrote them. None everywhere: chosen from the profile and the model."""

    nodes: int | None = None
    """Number of nodes. None: 1."""
    gpus_per_node: int | None = None
    """GPUs of each node; 0 is CPU only. None: the profile's."""
    ranks_per_node: int | None = None
    """Worker processes per node. None: one per GPU, or one on CPU."""
    cpus_per_node: int | None = None
    """CPU cores of each node. None: the profile's, else 4 per GPU rank and 1 per CPU rank."""
    memory: str | None = None
    """Memory of each node with Slurm's unit (`64G`). None: the profile's."""
    time: str | int | None = None
    """Time limit, minutes or "8:00:00". None: the profile's."""
    tp_size: int | None = None
    """Tensor parallel size. None: the smallest with which the weights fit a GPU; the other ranks are data parallel."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "gpus_per_node" else 1
            if field.name in ("memory", "time") or value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{field.name} is {value!r}; it must be a whole number of at least {least}.")


def build_job_spec(
    resources: Resources,
    *,
    profile: ClusterProfile,
    base_model: BaseModel,
    asked_base_model: str,
    run_id: str,
    kind: Literal["run", "session"],
    name: str,
    command: tuple[str, ...] | None = None,
    working_folder: str | None = None,
    environment: Mapping[str, str] | None = None,
    serves_run: str | None = None,
) -> JobSpec:
    """The job that serves `base_model` with these resources on that cluster.

    Raises: ConfigError where the sizes cannot go together.
    """
    nodes = resources.nodes or 1
    gpus_per_node = profile.default_gpus_per_node if resources.gpus_per_node is None else resources.gpus_per_node
    ranks_per_node = resources.ranks_per_node or gpus_per_node or 1
    tp_size = resources.tp_size or choose_tp_size(
        weights_gib=weights_gib(base_model) if gpus_per_node else 0.0,
        ranks_per_node=ranks_per_node,
        num_heads=_num_heads(base_model),
    )
    world_size = nodes * ranks_per_node
    if world_size % tp_size:
        raise ConfigError(
            f"tp_size is {tp_size}, which does not divide the {world_size} ranks of {nodes} node(s) with "
            f"{ranks_per_node} each. Choose a tp_size that divides {world_size}."
        )
    num_heads = _num_heads(base_model)
    if num_heads % tp_size:
        raise ConfigError(
            f"tp_size is {tp_size}, which does not divide the {num_heads} key-value heads of {base_model.name}. "
            f"Choose a tp_size that divides {num_heads}."
        )
    return JobSpec(
        run_id=run_id,
        kind=kind,
        name=name,
        base_model=asked_base_model,
        base_model_folder=str(base_model.folder),
        cluster=profile,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_node=resources.cpus_per_node
        or profile.cpus_per_node
        or ranks_per_node * (CPUS_PER_GPU if gpus_per_node else 1),
        memory=resources.memory,
        time_limit_min=parse_time_limit_min(resources.time, default=profile.time_limit_min),
        layout=Layout(tp_size=tp_size, dp_size=world_size // tp_size),
        command=command,
        working_folder=working_folder or os.getcwd(),
        environment=dict(environment or {}),
        serves_run=serves_run,
    )


def choose_tp_size(*, weights_gib: float, ranks_per_node: int, num_heads: int) -> int:
    """The smallest tensor parallel size with which a rank's weights fit, within one node (NVLink ends there).

    Args:
        weights_gib: of the whole model in bf16.
        num_heads: key-value heads; a rank holds whole ones.
    Returns: a divisor of both; the largest there is if even that does not fit (the worker's own error says so).
    """
    sizes = [n for n in range(1, ranks_per_node + 1) if ranks_per_node % n == 0 and num_heads % n == 0]
    return next((n for n in sizes if weights_gib / n <= MAX_WEIGHTS_GIB_PER_GPU), sizes[-1])


def weights_gib(base_model: BaseModel) -> float:
    """Size of the safetensors files, as they lie on disk (bf16 nearly always)."""
    try:
        return sum(file.stat().st_size for file in base_model.folder.glob("*.safetensors")) / 2**30
    except OSError:
        return 0.0


def _num_heads(base_model: BaseModel) -> int:
    config = base_model.config.get("text_config") or base_model.config
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)


def check_run_name(name: str | None, *, otherwise: str) -> str:
    """The name a run id starts with: the user's, refused if it cannot be one; else made from `otherwise`.

    Raises: ConfigError.
    """
    if name is None:
        made = re.sub(r"[^A-Za-z0-9._-]+", "-", otherwise.rstrip("/").rsplit("/", 1)[-1]).strip("-._")
        return made[:40] or "run"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            f"name is {name!r}; it becomes a folder and job name: up to 64 letters, digits, `.`, `_` and `-`, starting "
            "with a letter or digit."
        )
    return name
