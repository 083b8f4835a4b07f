"""What the user asked for, the cluster's profile and the model's config.json -> a job spec (pure).

Shared by submit(), session() and the command line, so that `--dry-run` prints exactly what a run would submit.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from launch.job_spec import JobSpec, Layout
from launch.model_sizes import ModelSizes, read_sizes
from launch.plan import Machine, Plan, Wish, make_plan, possible_layouts
from tinker_hpc.base_models import BaseModel
from tinker_hpc.config import ClusterProfile, parse_memory_gib, parse_time_limit_min
from tinker_hpc.errors import ConfigError
from tinker_hpc.supported_models import check_supported

CPUS_PER_GPU = 4
GPU_MEMORY_GIB = {
    "v100": 16, "t4": 16, "a30": 24, "l4": 24, "a100": 40, "a40": 48, "a6000": 48, "l40s": 48, "h100": 80, "h200": 141,
    "gh200": 96, "b200": 180,
}  # fmt: skip
"""By the word in `gpu_type`; where one was sold in several sizes and the type does not say which, the smallest."""
STATED_MEMORY = re.compile(r"(?<![a-z0-9])(\d+)gb(?![a-z0-9])")
"""The size in types as NVIDIA's driver spells them, `nvidia_a100-sxm4-80gb`. A gh200's 480gb are its CPU's."""
MIG_SLICE = re.compile(r"(?<![a-z0-9])[1-7]g[^a-z0-9](\d+)gb")
"""The slices of a GPU that Slurm gives out like whole ones, by NVIDIA's names: 3g.20gb in `a100_3g.20gb` is three
sevenths of the cores and 20 GB (docs.nvidia.com/datacenter/tesla/mig-user-guide)."""
ASSUMED_GPU_MEMORY_GIB = 40
"""Where neither the profile nor the GPU's type says: a layout for a smaller GPU also runs on a larger one."""
DRIVER_CPUS = 2
DRIVER_MEMORY = "4G"
"""The loop, its tokenizer and datasets, and the gateway."""


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
    """Tensor parallel size. None: planned into the GPUs' memory (launch/plan.py); other ranks are data parallel."""
    pp_size: int | None = None
    """Pipeline stages. None: planned."""
    ep_size: int | None = None
    """Ranks that share the experts of a layer out among them. None: planned; 1 without experts."""

    @property
    def sizes_by_hand(self) -> dict[str, int]:
        """Of the layout's sizes those that are given."""
        sizes = {"tp_size": self.tp_size, "pp_size": self.pp_size, "ep_size": self.ep_size}
        return {name: size for name, size in sizes.items() if size is not None}

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
    per_expert: bool = False,
) -> JobSpec:
    """The job that serves `base_model` with these resources on that cluster. per_expert: see Config.expert_lora.

    Raises: ConfigError where the sizes cannot go together.
    """
    nodes = resources.nodes or 1
    gpus_per_node = profile.default_gpus_per_node if resources.gpus_per_node is None else resources.gpus_per_node
    ranks_per_node = resources.ranks_per_node or gpus_per_node or 1
    machine = Machine(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        memory_gib=rank_memory_gib(profile, gpus_per_node, ranks_per_node, resources.memory or profile.memory),
        on_gpu=gpus_per_node > 0,
        sliced=gpus_per_node > 0 and has_slices(profile),
    )
    plan = plan_for(base_model, machine, **resources.sizes_by_hand, per_expert=per_expert)
    sure = resources.tp_size is None and machine.on_gpu and known_gpu_memory_gib(profile) is not None
    if sure and not plan.fits:
        raise ConfigError(
            f"{base_model.name} does not fit {nodes} node(s) with {ranks_per_node} GPU(s) of {machine.memory_gib:g} GiB"
            f"{_where_memory_is_from(profile)}. {' '.join(plan.reasons)} To try all the same, give tp_size by hand."
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
        layout=Layout(
            tp_size=plan.tp_size,
            dp_size=plan.dp_size,
            pp_size=plan.pp_size,
            ep_size=plan.ep_size,
            token_budget=plan.token_budget,
            recompute=plan.recompute,
        ),
        sizes_by_hand=resources.sizes_by_hand,
        command=command,
        working_folder=working_folder or os.getcwd(),
        environment=dict(environment or {}),
        serves_run=serves_run,
    )


def driver_spec(worker: JobSpec, *, run_id: str, command: tuple[str, ...] | None) -> JobSpec:
    """The CPU job with the loop and the gateway, beside a worker that is a job of its own."""
    return replace(
        worker,
        run_id=run_id,
        kind="driver",
        cluster=driver_profile(worker.cluster),
        nodes=1,
        ranks_per_node=1,
        gpus_per_node=0,
        cpus_per_node=DRIVER_CPUS,
        memory=DRIVER_MEMORY,
        layout=Layout(),
        sizes_by_hand={},
        command=command,
        serves_run=None,
    )


def driver_profile(profile: ClusterProfile) -> ClusterProfile:
    """What the CPU job takes of a profile: what every job there needs, not what chooses a GPU node."""
    partition = profile.driver_partition or profile.partition
    return replace(profile, partition=partition, constraint=None, gpu_type=None, extra=())


def plan_for(
    base_model: BaseModel,
    machine: Machine,
    *,
    tp_size: int | None = None,
    pp_size: int | None = None,
    ep_size: int | None = None,
    lora_rank: int = 32,
    num_adapters: int = 1,
    per_expert: bool = False,
) -> Plan:
    """The layout of this model on this machine, chosen but for what is given.

    Raises: ConfigError if the worker would not run the model, its config.json does not say its size, several ranks
        are asked for on slices of GPUs, or nothing divides model and machine.
    """
    if machine.sliced and machine.world_size > 1:
        raise ConfigError(
            f"{machine.nodes} node(s) with {machine.ranks_per_node} rank(s) each were asked for, but gpu_type is a "
            "slice of a GPU (MIG), and ranks on slices cannot communicate. Ask for one node with one GPU (nodes, "
            "gpus_per_node), or set the gpu_type of whole GPUs in the cluster's profile."
        )
    where = str(base_model.folder / "config.json")
    check_supported(base_model.config, where)
    sizes = read_sizes(base_model.config, where)
    wish = Wish(tp_size=tp_size, ep_size=ep_size, pp_size=pp_size)
    plan = make_plan(sizes, machine, wish=wish, lora_rank=lora_rank, num_adapters=num_adapters, per_expert=per_expert)
    if plan is None:
        raise ConfigError(_misfit(base_model.name, sizes, machine, wish))
    return plan


def _misfit(model: str, sizes: ModelSizes, machine: Machine, wish: Wish) -> str:
    """Which of the given sizes leaves no layout, the others before it being kept; its rule, and what would do."""
    culprit, kept = "tp_size", Wish()
    with_tp = Wish(tp_size=wish.tp_size)
    for name, given in (("pp_size", with_tp), ("ep_size", replace(with_tp, pp_size=wish.pp_size))):
        if any(possible_layouts(sizes, machine, given)):
            culprit, kept = name, given
    rules = {
        "tp_size": f"it must divide the {machine.ranks_per_node} ranks of a node, and the {sizes.num_heads} heads and "
        f"the MLP's width of {model}, and divide its {sizes.num_kv_heads} key-value heads or be a multiple of them",
        "pp_size": f"tp_size * pp_size must divide the {machine.world_size} ranks, and {model} has {sizes.num_layers} "
        "layers to share out",
        "ep_size": f"it must divide tp_size * dp_size and the {sizes.num_experts} experts of a layer of {model}"
        if sizes.num_experts
        else f"{model} has no experts to share out",
    }
    beside = " and ".join(f"{name} {size}" for name, size in asdict(kept).items() if size is not None)
    would_do = sorted({getattr(split, culprit) for split in possible_layouts(sizes, machine, kept)})
    return (
        f"{culprit} is {getattr(wish, culprit)}{f', beside {beside}' if beside else ''}: {rules[culprit]}. "
        f"Choose {' or '.join(map(str, would_do))}, or leave it out."
    )


def rank_memory_gib(profile: ClusterProfile, gpus_per_node: int, ranks_per_node: int, memory: str | None) -> float:
    """What one rank may fill: its GPU's memory, or on a CPU its share of the node's; infinite if it is not known."""
    if gpus_per_node:
        return float(known_gpu_memory_gib(profile) or ASSUMED_GPU_MEMORY_GIB)
    if memory is None:
        return math.inf
    return parse_memory_gib(memory) / ranks_per_node


def known_gpu_memory_gib(profile: ClusterProfile) -> int | None:
    """Memory of a GPU of this cluster, from the profile or the type of its GPUs; None if neither says."""
    if profile.gpu_memory_gib is not None:
        return profile.gpu_memory_gib
    gpu_type = (profile.gpu_type or "").lower()
    if part := MIG_SLICE.search(gpu_type):
        return int(part[1])
    words = re.split(r"[^a-z0-9]+", gpu_type)
    if "gh200" not in words and (stated := STATED_MEMORY.search(gpu_type)):
        return int(stated[1])
    return next((GPU_MEMORY_GIB[word] for word in words if word in GPU_MEMORY_GIB), None)


def _where_memory_is_from(profile: ClusterProfile) -> str:
    """Behind a size that the profile does not state itself: where it is from, and how to put it right."""
    if profile.gpu_memory_gib is not None:
        return ""
    return (
        f", taken from gpu_type {profile.gpu_type!r} (where that is wrong, set gpu_memory_gib in "
        f"[clusters.{profile.name}] of the configuration)"
    )


def has_slices(profile: ClusterProfile) -> bool:
    """Whether the GPUs of this cluster, by their type, are slices of one (MIG)."""
    return MIG_SLICE.search((profile.gpu_type or "").lower()) is not None


def base_model_names(base_model: object) -> list[str]:
    """The base models that a call's `base_model` names, one or several, as text.

    Raises: ConfigError if that is not what it is.
    """
    several = base_model if isinstance(base_model, Sequence) and not isinstance(base_model, str) else [base_model]
    names = [os.fspath(one) for one in several if isinstance(one, str | os.PathLike)]
    if len(names) < len(several):
        raise ConfigError(
            f"base_model is {base_model!r}; expected a hub name, the folder of a model, or a list of such."
        )
    return names


def check_run_name(name: str | None, *, otherwise: str) -> str:
    """The name a run id starts with: the user's, refused if it cannot be one; else made from `otherwise`.

    Raises: ConfigError.
    """
    if name is None:
        made = re.sub(r"[^A-Za-z0-9._-]+", "-", otherwise.rstrip("/").rsplit("/", 1)[-1]).strip("-._")
        return made[:40] or "run"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            f"name is {name!r}; it becomes a folder and job name: a string of up to 64 letters, digits, `.`, `_` and "
            "`-`, starting with a letter or digit."
        )
    return name
