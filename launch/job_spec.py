"""What one job is: everything `sbatch` and the supervisor need to know, decided before anything is submitted.

A spec is frozen, holds only plain values, and travels as JSON (`run.json`): the client writes it, the supervisor on
the node reads it, `status` and error messages quote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from tinker_hpc.config import ClusterProfile, parse_memory_gib
from tinker_hpc.errors import ConfigError

# A run id is the job's name, a folder name and a word in squeue's output: nothing in it may need quoting.
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Layout:
    """How a worker's ranks are used. World size is tp_size * dp_size * pp_size."""

    tp_size: int = 1
    """Tensor parallel size; sequence parallel where it is more than 1."""
    dp_size: int = 1
    """Data parallel size."""
    dtype: str | None = None
    """`float32` or `bfloat16`; None: bfloat16 on CUDA, float32 on CPU."""
    token_budget: int | None = None
    """Tokens of a micro-batch, as planned into the memory; None: the engine's own."""
    pp_size: int = 1
    """Pipeline stages."""
    ep_size: int = 1
    """Ranks of a stage that share its experts; divides tp_size * dp_size."""
    recompute: bool = False
    """Compute activations again in the backward instead of keeping them: less memory, a third more time."""

    @property
    def world_size(self) -> int:
        """Number of ranks over all nodes."""
        return self.tp_size * self.dp_size * self.pp_size


@dataclass(frozen=True)
class JobSpec:
    """One Slurm job (or local stand-in): a worker, and for a run also the gateway and the user's loop."""

    run_id: str
    """Name of the run folder. Also the job's name in Slurm: our marker to find it again."""
    kind: Literal["run", "session", "driver"]
    """`run`: gateway and loop live on the first node. `driver`: they are all there is, the worker is a job of its own.
    `session`: a worker alone; the gateway is elsewhere (on the
    session's client, or in the run of `serves_run`)."""
    name: str
    """What the user called it."""
    base_model: str
    """As the user wrote it: a hub name or a folder."""
    base_model_folder: str
    """The folder on the shared filesystem that the ranks load."""
    cluster: ClusterProfile
    nodes: int = 1
    ranks_per_node: int = 1
    """Worker processes per node: one per GPU, or as many as asked for on CPU."""
    gpus_per_node: int = 0
    cpus_per_node: int = 1
    memory: str | None = None
    """Per node, with Slurm's unit (`64G`). None: the profile's, else the cluster's default."""
    time_limit_min: int = 60
    layout: Layout = field(default_factory=Layout)
    sizes_by_hand: Mapping[str, int] = field(default_factory=dict)
    """Of the layout's tp_size, pp_size and ep_size those that were given; the others were planned into the cluster's
    GPUs, and are planned anew for another cluster's."""
    command: tuple[str, ...] | None = None
    """The user's program. None: the pickled function in `payload.pkl`."""
    working_folder: str | None = None
    """Where the loop runs: the folder `submit` was called in. None: the user's home."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set in the job, after the profile's own."""
    serves_run: str | None = None
    """A worker for a further base model of a run: that run's id. The worker ends when the run does."""

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise ConfigError(
                f"run id {self.run_id!r}: it becomes a job name and a folder name, so letters, digits, `.`, `_` and "
                "`-` only, starting with a letter or digit. Choose another `name`."
            )
        for name in ("nodes", "ranks_per_node", "cpus_per_node", "time_limit_min"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.gpus_per_node < 0:
            raise ConfigError(f"gpus_per_node is {self.gpus_per_node}; it must be 0 (CPU) or more.")
        layout = self.layout
        for name in ("tp_size", "dp_size", "pp_size", "ep_size"):
            if getattr(layout, name) < 1:
                raise ConfigError(f"{name} is {getattr(layout, name)}; it must be at least 1.")
        if layout.world_size != self.nodes * self.ranks_per_node:
            raise ConfigError(
                f"tp_size ({layout.tp_size}) * dp_size ({layout.dp_size}) * pp_size ({layout.pp_size}) = "
                f"{layout.world_size} ranks, but nodes ({self.nodes}) * ranks_per_node ({self.ranks_per_node}) = "
                f"{self.nodes * self.ranks_per_node}. Change the layout or the number of nodes."
            )
        if layout.tp_size * layout.dp_size % layout.ep_size:
            raise ConfigError(
                f"ep_size ({layout.ep_size}) does not divide tp_size ({layout.tp_size}) * dp_size ({layout.dp_size}), "
                "the ranks over which experts are spread. Choose one that does."
            )
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ConfigError(
                f"ranks_per_node is {self.ranks_per_node} but gpus_per_node {self.gpus_per_node}: each rank needs a "
                "GPU of its own. Ask for more GPUs per node or spread the ranks over more nodes."
            )
        if self.memory is not None:
            parse_memory_gib(self.memory)
        if self.cluster.executor == "local" and self.nodes != 1:
            raise ConfigError(
                f"nodes is {self.nodes}, but cluster {self.cluster.name!r} is this machine alone (executor local): "
                "use nodes=1 with several ranks, or name a Slurm cluster."
            )
        if self.kind == "session" and self.command is not None:
            raise ConfigError("a session has no loop, so it takes no command; use a run.")

    @property
    def world_size(self) -> int:
        """Number of worker processes over all nodes."""
        return self.layout.world_size

    @property
    def memory_per_node(self) -> str | None:
        """The memory to ask for: the job's own, else the profile's."""
        return self.memory or self.cluster.memory

    @property
    def variables(self) -> dict[str, str]:
        """Every environment variable to set in the job, the job's own winning over the profile's."""
        return {**self.cluster.environment, **self.environment}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, all of them: `run.json`."""
        value = asdict(self)
        value["cluster"]["environment"] = dict(self.cluster.environment)
        value["environment"] = dict(self.environment)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> JobSpec:
        """The spec in `run.json`. Fields a later version wrote and this one does not know are left out."""
        known = {name: value[name] for name in (f.name for f in fields(cls)) if name in value}
        known["cluster"] = _rebuild(ClusterProfile, value["cluster"])
        known["layout"] = _rebuild(Layout, value.get("layout") or {})
        if known.get("command") is not None:
            known["command"] = tuple(known["command"])
        return cls(**known)


def _rebuild(cls: type[_T], value: Mapping[str, Any]) -> _T:
    """A frozen dataclass from JSON: known fields only, lists back to tuples."""
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in names})
