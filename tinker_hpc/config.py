"""The user's configuration: where data goes, which clusters there are, which base models are already downloaded.

    ~/.config/tinker_hpc/config.toml           (or $XDG_CONFIG_HOME/tinker_hpc/config.toml, or TINKER_HPC_CONFIG)

    data_root = "/scratch/alice/tinker_hpc_data"    # or TINKER_HPC_DATA_ROOT
    cluster = "della"                          # or TINKER_HPC_CLUSTER

    [clusters.della]
    executor = "slurm"
    partition = "gpu"

    [base_models]
    "Qwen/Qwen3-8B" = "/scratch/shared/models/Qwen3-8B"

The environment wins over the file, an argument (`cluster=`) wins over both. Every key is a field of `Config` or
`ClusterProfile` below; any other key is refused, because a misspelt `acount` would otherwise cost a day in the queue.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tinker_hpc.errors import ConfigError, UnknownClusterError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ClusterProfile:
    """One `[clusters.NAME]` table: what every job on that cluster needs beside its sizes."""

    name: str = "local"
    """The NAME of the table; what `cluster=` and `--cluster` take."""
    executor: Literal["slurm", "local"] = "slurm"
    """`slurm` submits through sbatch; `local` runs the same job as processes on this machine."""
    partition: str | None = None
    """sbatch --partition. None: the cluster's default partition."""
    driver_partition: str | None = None
    """sbatch --partition of the CPU job that carries the loop, with `driver="separate"`. None: `partition`. Name one
    whose jobs are not preempted, where the workers' are."""
    account: str | None = None
    """sbatch --account. None: the user's default account."""
    qos: str | None = None
    """sbatch --qos. None: the association's default."""
    constraint: str | None = None
    """sbatch --constraint, node features such as `a100&nvlink`. None: any node."""
    memory: str | None = None
    """sbatch --mem, per node, with Slurm's unit (`64G`; a bare number is MiB). None: the cluster's default."""
    gpu_type: str | None = None
    """The type in sbatch --gres=gpu:TYPE:N. None: any GPU of the partition."""
    gpus_per_node: int | None = None
    """GPUs of a node where the job does not say. None: 1 on slurm, 0 (CPU) on local. Loud beats slow: a cluster without
    GPUs refuses the 1 at once, while an 8B model on CPU would merely never finish."""
    gpu_memory_gib: int | None = None
    """Memory of one GPU, as it is sold: 80 for an H100. The layout is planned into it. None: known from `gpu_type`, or
    assumed to be small."""
    cpus_per_node: int | None = None
    """CPU cores of a node where the job does not say. None: 4 for each GPU rank, 1 for each CPU rank."""
    time_limit_min: int = 60
    """sbatch --time in minutes where the job does not say. An hour: short jobs backfill sooner."""
    setup: tuple[str, ...] = ()
    """Shell lines before Python starts on the node, e.g. `module load cuda`."""
    extra: tuple[str, ...] = ()
    """Options for further #SBATCH lines, e.g. `--exclude=node7`."""
    python: str | None = None
    """The interpreter on the compute nodes. None: the one that submits, as homes are shared."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set in the job, e.g. `NCCL_SOCKET_IFNAME` and `GLOO_SOCKET_IFNAME`."""

    def __post_init__(self) -> None:
        where = f"cluster profile {self.name!r}"
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{where}: a name is letters, digits, `-`, `_` and `.`, starting with a letter or digit.")
        if self.executor not in ("slurm", "local"):
            raise ConfigError(f'{where}: executor is {self.executor!r}; it must be "slurm" or "local".')
        if self.memory is not None:
            parse_memory_gib(self.memory, where)
        for name, least in (
            ("gpus_per_node", 0),
            ("gpu_memory_gib", 1),
            ("cpus_per_node", 1),
            ("time_limit_min", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{where}: {name} is {value}; it must be at least {least}.")
        for option in self.extra:
            if not option.startswith("-") or "\n" in option:
                raise ConfigError(f"{where}: extra line {option!r} must be one sbatch option, e.g. '--exclude=node7'.")

    @property
    def default_gpus_per_node(self) -> int:
        """GPUs of a node where the job does not say."""
        return self.gpus_per_node if self.gpus_per_node is not None else int(self.executor == "slurm")


@dataclass(frozen=True)
class Config:
    """The whole configuration, after file and environment."""

    data_root: Path
    """One folder on the shared filesystem for runs and checkpoints, mode 0700. Default ~/tinker_hpc_data: the home is
    the one folder every cluster shares; change it where the home has a small quota. Not ~/tinker_hpc: Python started in
    the home would take a folder of that name for the package (an editable install loses to it)."""
    cluster: str
    """The profile used where `cluster=` is not given. Default: `local` where there is no sbatch; else the only slurm
    profile of the file, else `slurm`, a profile with all defaults."""
    clusters: Mapping[str, ClusterProfile]
    """Profiles by name. `local` and `slurm` always exist; the file may replace them."""
    base_models: Mapping[str, str]
    """Hub name = folder, for models that are downloaded already; asked before the hub's own cache, by the worker and
    (for tokenizers) by the loop."""
    state_dir: Path
    """This machine's own folder for the run index (SQLite does not belong on a shared filesystem).
    Default $XDG_STATE_HOME/tinker_hpc or ~/.local/state/tinker_hpc; TINKER_HPC_STATE_DIR."""
    stable_reinforce: str | None = None
    """What `loss_fn="stable_reinforce"` means: "importance_sampling" computes that instead. None: such requests are
    refused, because the loss's formula is not published and another loss should not take its place unasked."""
    expert_lora: str = "shared_outer"
    """LoRA on a mixture of experts. "shared_outer", as Tinker trains: of each expert matrix the factor on the hidden
    side is one for all experts of a layer. "per_expert": every expert has an A and B of its own, 3.4 times the state on
    Qwen3-30B-A3B. Of adapters that are created from now on; one made from a checkpoint is as that was."""
    routing_replay: bool = False
    """On a mixture of experts: train every token with the experts that it went through while it was sampled, as
    "rollout routing replay" does (arXiv:2510.11370). In bfloat16 sampler and trainer choose others now and then. Data
    that are no sampled sequence are trained as the routers choose. A base without experts is refused."""
    path: Path | None = None
    """The file this came from; None if there is none."""

    def profile(self, name: str | None = None) -> ClusterProfile:
        """The profile of that name, or the default one.

        Raises: UnknownClusterError listing the known names; ConfigError for what is no name.
        """
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"cluster is {name!r}; expected a profile's name: {', '.join(sorted(self.clusters))}.")
        wanted = name or self.cluster
        if wanted not in self.clusters:
            where = self.path or default_config_path(os.environ)
            raise UnknownClusterError(
                f"no cluster profile {wanted!r}; known are {', '.join(sorted(self.clusters))}. "
                f"Add [clusters.{wanted}] to {where}, or name one of these."
            )
        return self.clusters[wanted]


def default_config_path(environ: Mapping[str, str]) -> Path:
    """Where the configuration file is looked for when TINKER_HPC_CONFIG is not set."""
    home = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "tinker_hpc" / "config.toml"


def load_config(path: Path | None = None, *, environ: Mapping[str, str] | None = None) -> Config:
    """Read the configuration file and the environment.

    Args:
        path: the file; None: TINKER_HPC_CONFIG, else the default place, where the file may be missing.
        environ: None: os.environ.
    Raises: ConfigError naming the file, the key and the valid keys.
    """
    environ = os.environ if environ is None else environ
    said = environ.get("TINKER_HPC_CONFIG")  # os.path leaves the ~ of an unknown user as it is, pathlib raises
    named = path or (Path(os.path.expanduser(said)) if said else None)
    file = named or default_config_path(environ)
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        if named is not None:
            raise ConfigError(
                f"no configuration file {named}. Create it, or unset TINKER_HPC_CONFIG to use "
                f"{default_config_path(environ)}."
            ) from None
        return build_config({}, environ=environ)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}. Check its permissions.") from error
    return build_config(table, environ=environ, path=file)


def build_config(
    table: Mapping[str, Any],
    *,
    environ: Mapping[str, str],
    path: Path | None = None,
    has_sbatch: bool | None = None,
) -> Config:
    """Check a parsed configuration and fill in the defaults; reads nothing but PATH (for sbatch, unless told).

    Raises: ConfigError as `load_config`.
    """
    where = str(path) if path else "the configuration"
    known = {"data_root": str, "cluster": str, "state_dir": str, "clusters": dict, "base_models": dict}
    known |= {"stable_reinforce": str, "expert_lora": str, "routing_replay": bool}
    _check_keys(table, known, where)
    clusters = {"local": ClusterProfile("local", executor="local"), "slurm": ClusterProfile("slurm")}
    described = {name: _profile(name, entry, where) for name, entry in table.get("clusters", {}).items()}
    clusters.update(described)
    base_models: dict[str, str] = {}
    for model, folder in table.get("base_models", {}).items():
        if not isinstance(folder, str):
            raise ConfigError(f'{where}: [base_models] "{model}" is {folder!r}; expected the path of a folder.')
        base_models[model] = str(_folder(folder, environ, f'{where}: [base_models] "{model}"'))
    stable_reinforce = table.get("stable_reinforce")
    if stable_reinforce not in (None, "importance_sampling"):
        raise ConfigError(
            f"{where}: stable_reinforce is {stable_reinforce!r}; the one loss it may stand for is "
            '"importance_sampling".'
        )
    expert_lora = table.get("expert_lora", "shared_outer")
    if expert_lora not in ("shared_outer", "per_expert"):
        raise ConfigError(f'{where}: expert_lora is {expert_lora!r}; it must be "shared_outer" or "per_expert".')
    if has_sbatch is None:
        has_sbatch = shutil.which("sbatch", path=environ.get("PATH")) is not None
    on_slurm = [profile.name for profile in described.values() if profile.executor == "slurm"]
    default_cluster = "local" if not has_sbatch else on_slurm[0] if len(on_slurm) == 1 else "slurm"
    state_home = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Config(
        data_root=_folder(
            environ.get("TINKER_HPC_DATA_ROOT") or table.get("data_root", "~/tinker_hpc_data"), environ, "data_root"
        ),
        cluster=environ.get("TINKER_HPC_CLUSTER") or table.get("cluster", default_cluster),
        clusters=clusters,
        base_models=base_models,
        state_dir=_folder(
            environ.get("TINKER_HPC_STATE_DIR") or table.get("state_dir", f"{state_home}/tinker_hpc"),
            environ,
            "state_dir",
        ),
        stable_reinforce=stable_reinforce,
        expert_lora=expert_lora,
        routing_replay=table.get("routing_replay", False),
        path=path,
    )


def _profile(name: str, table: Any, where: str) -> ClusterProfile:
    here = f"{where}: [clusters.{name}]"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{here} is {table!r}; expected a table.")
    kinds = {f.name: _KINDS.get(f.name, str) for f in fields(ClusterProfile) if f.name != "name"}
    _check_keys(table, kinds, here)
    values = dict(table)
    for key in ("setup", "extra"):
        if key in values:
            if not all(isinstance(line, str) for line in values[key]):
                raise ConfigError(f"{here}: {key} is {values[key]!r}; expected a list of strings.")
            values[key] = tuple(values[key])
    check_environment(values.get("environment", {}), here)
    if "executor" not in values and name == "local":
        values["executor"] = "local"
    return ClusterProfile(name=name, **values)


# What TOML gives for each key of a profile; a string where it is not listed.
_KINDS: dict[str, type] = {
    "gpus_per_node": int,
    "gpu_memory_gib": int,
    "cpus_per_node": int,
    "time_limit_min": int,
    "setup": list,
    "extra": list,
    "environment": dict,
}
_TOML_NAMES = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    list: "a list of strings",
    dict: "a table",
}


def _check_keys(table: Mapping[str, Any], known: Mapping[str, type], where: str) -> None:
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; valid keys are {', '.join(sorted(known))}.")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            raise ConfigError(f"{where}: {key} is {value!r}; expected {_TOML_NAMES[known[key]]}.")


_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


def _folder(text: str, environ: Mapping[str, str], where: str) -> Path:
    """`text` as an absolute path, `~` and `$VARIABLES` replaced; clusters name scratch by variables."""

    if not text.strip():
        raise ConfigError(f"{where} is {text!r}, expected the path of a folder. Write one, or leave it out.")

    def value(match: re.Match[str]) -> str:
        variable = match.group(1) or match.group(2)
        if not environ.get(variable):
            raise ConfigError(f"{where} is {text!r}, but ${variable} is not set. Set it, or write the path out.")
        return environ[variable]

    return Path(os.path.abspath(os.path.expanduser(_VARIABLE.sub(value, text))))


_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_environment(environment: object, where: str = "") -> None:
    """Refuse variables that the job's script could not `export`.

    Raises: ConfigError naming the variable.
    """
    here = f"{where}: " if where else ""
    if not isinstance(environment, Mapping):
        raise ConfigError(
            f'{here}environment is {environment!r}; expected variables by name, {{"NCCL_DEBUG": "WARN"}}.'
        )
    for variable, value in environment.items():
        if not isinstance(variable, str) or not _VARIABLE_NAME.fullmatch(variable):
            raise ConfigError(
                f"{here}environment has a variable {variable!r}; a name is letters, digits and `_`, not beginning with "
                "a digit."
            )
        if not isinstance(value, str):
            raise ConfigError(f'{here}environment {variable} is {value!r}; write it as a string, "{value}".')


def parse_memory_gib(memory: str, where: str = "") -> float:
    """GiB of a memory size as Slurm takes it: `64G`; a bare number is MiB. Infinite for `0`, all that a node has.

    Raises: ConfigError for anything else.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)", memory) if isinstance(memory, str) else None
    if match is None:
        here = f"{where}: " if where else ""
        raise ConfigError(f'{here}memory is {memory!r}; write a number and K, M, G or T, for example "64G".')
    number, unit = int(match[1]), match[2] or "M"
    return number * {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}[unit] if number else math.inf


def parse_time_limit_min(time_limit: str | int | None, *, default: int) -> int:
    """Minutes of a Slurm time limit: `30`, `"30"` (minutes), `"8:00:00"`, `"90:00"` (min:s), `"1-12"`, `"1-12:30:00"`.

    Seconds are rounded up to whole minutes, Slurm's own resolution. None gives `default`.
    Raises: ConfigError for anything else, and for zero.
    """
    if time_limit is None:
        return default
    text = str(time_limit).strip()
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if isinstance(time_limit, bool) or match is None:
        raise ConfigError(
            f'time is {time_limit!r}; write minutes (90) or "hours:minutes:seconds" or "days-hours:min:s".'
        )
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    if days is not None:  # days-hours[:minutes[:seconds]]
        seconds = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:  # hours:minutes:seconds
        seconds = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:  # minutes[:seconds]
        seconds = (first or 0) * 60 + (second or 0)
    if seconds == 0:
        raise ConfigError(f"time is {time_limit!r}, which is no time at all; the least is one minute.")
    return -(-seconds // 60)
