"""Adapters on disk: PEFT's files with canonical full matrices, so that any layout loads any other's.

adapter_model.safetensors   base_model.model.<path>.lora_{A,B}.weight, float32, exactly PEFT's names and shapes
adapter_config.json         PEFT's LoraConfig
optimizer.safetensors       <the same key>.exp_avg and .exp_avg_sq; metadata "step"
gradients.safetensors       in a worker's snapshots alone, see training_state.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinker_hpc.errors import WeightsError

from .adapters import Adapter, LoraPair, LoraWeights, Shard, peft_key, shard_layout
from .families import Architecture
from .projections import ATTENTION, MLP, UNEMBED, Projection, projections
from .runtime import Runtime, on_rank_zero
from .weights import check_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
GRADIENTS_FILE = "gradients.safetensors"

PREFIX, SUFFIX_A = "base_model.model.", ".lora_A.weight"

# PEFT options that change what the matrices mean; loading them as plain LoRA would be silently wrong.
_FOREIGN = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
    "lora_bias",
)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json and the names in the file say."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class HostCopy:
    """What an adapter's folder will hold: canonical full matrices in memory of rank 0's own, nothing on other ranks."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    """empty where the optimizer's state is not wanted"""
    step: int
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """of passes since the last optimizer step (training_state.py); empty if there were none"""

    def write(self, folder: Path) -> None:
        """Write the files; no collective. Raises: OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        if self.moments:
            save_file(self.moments, folder / OPTIMIZER_FILE, metadata={"format": "pt", "step": str(self.step)})
        if self.gradients:
            save_file(self.gradients, folder / GRADIENTS_FILE, metadata={"format": "pt"})


def collect(adapter: Adapter, runtime: Runtime, *, optimizer: bool, base_model: str) -> HostCopy:
    """The adapter as it is now; what happens to it afterwards does not show in the copy.

    Collectives: in the first data-parallel copy one all-gather per buffer over the TP group.
    """
    weights = gather(adapter.shards, adapter.weights, runtime)
    moments: dict[str, Tensor] = {}
    if optimizer:
        for name, flat in (("exp_avg", adapter.exp_avg), ("exp_avg_sq", adapter.exp_avg_sq)):
            moments |= {f"{key}.{name}": x for key, x in gather(adapter.shards, flat, runtime).items()}
    config = peft_config(adapter.lora.rank, adapter.lora.alpha, adapter.lora.targets, base_model)
    return HostCopy(config, weights, moments, adapter.step)


def save(adapter: Adapter, runtime: Runtime, folder: Path, *, optimizer: bool, base_model: str) -> None:
    """Write the adapter into `folder`; rank 0 writes.

    Raises: OSError, on every rank, if rank 0 could not write.
    Collectives: in the first data-parallel copy one all-gather per buffer over the TP group; then one broadcast over
        the control group, after which the files are there.
    """
    copy = collect(adapter, runtime, optimizer=optimizer, base_model=base_model)
    on_rank_zero(runtime, lambda: copy.write(folder))


def peft_config(rank: int, alpha: float, targets: tuple[str, ...], base_model: str) -> dict[str, Any]:
    """adapter_config.json as PEFT's LoraConfig reads it; what is absent takes PEFT's default."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def read_config(folder: Path, arch: Architecture) -> AdapterConfig:
    """Rank, alpha and targets of the adapter in `folder`, after checking every name and shape in it.

    The targets come from the tensors' names, because PEFT also allows patterns in target_modules.

    Raises: WeightsError if a file is missing or unreadable, or the tensors are not plain LoRA of this base model.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"cannot read {folder / CONFIG_FILE}: {error}. Give the folder of a PEFT adapter."
        ) from error
    if foreign := [name for name in _FOREIGN if config.get(name)]:
        raise WeightsError(f"{folder / CONFIG_FILE} sets {', '.join(foreign)}; only plain LoRA can be loaded.")
    if not isinstance(config.get("r"), int) or config["r"] < 1 or "lora_alpha" not in config:
        raise WeightsError(f"{folder / CONFIG_FILE} has no usable r and lora_alpha. Is it a LoRA adapter?")
    with open_file(folder / WEIGHTS_FILE) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    paths = [key.removeprefix(PREFIX).removesuffix(SUFFIX_A) for key in found if key.endswith(SUFFIX_A)]
    present = {path.rsplit(".", 1)[-1] for path in paths}
    targets = tuple(name for name in ATTENTION + MLP + UNEMBED if name in present)
    wanted = projections(arch, targets)
    check_tensors(found, _expected_shapes(wanted, config["r"]), str(folder / WEIGHTS_FILE))
    return AdapterConfig(config["r"], float(config["lora_alpha"]), targets)


@torch.no_grad()
def load(adapter: Adapter, folder: Path, *, optimizer: bool) -> None:
    """Fill a freshly built adapter of the right rank and targets; without `optimizer` its moments stay zero.

    Raises: WeightsError; with optimizer=True also if there is no optimizer state. Collectives: none.
    """
    if not optimizer:
        with open_file(folder / WEIGHTS_FILE) as file:
            read_into(adapter, adapter.weights, file, "")
        return
    # Look at the second file before the first is copied: a failed load must leave the adapter as it was.
    with open_file(folder / OPTIMIZER_FILE) as file:
        expected = {f"{s.key}.{name}": s.full_shape for s in adapter.shards for name in ("exp_avg", "exp_avg_sq")}
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        check_tensors(found, expected, str(folder / OPTIMIZER_FILE))
        read_into(adapter, adapter.exp_avg, file, ".exp_avg")
        read_into(adapter, adapter.exp_avg_sq, file, ".exp_avg_sq")
        adapter.step = int((file.metadata() or {})["step"])
    with open_file(folder / WEIGHTS_FILE) as file:
        read_into(adapter, adapter.weights, file, "")


def load_snapshot(folder: Path, arch: Architecture, config: AdapterConfig, runtime: Runtime) -> LoraWeights:
    """This rank's frozen copy of the adapter in `folder`, in the compute dtype; no optimizer state is allocated."""
    wanted = projections(arch, config.targets)
    shards = {shard.key: shard for shard in shard_layout(wanted, config.rank, runtime.layout.tp_size)}
    with open_file(folder / WEIGHTS_FILE) as file:

        def read(path: str, letter: str) -> Tensor:
            key = peft_key(path, letter)
            part = _read_shard(file, shards[key], key, runtime.tp_rank)
            # Through float32 whatever is stored, as a trained adapter goes.
            return part.to(torch.float32).to(device=runtime.device, dtype=runtime.dtype)

        pairs = {p.path: LoraPair(read(p.path, "A"), read(p.path, "B")) for p in wanted}
    return LoraWeights(config.rank, config.alpha, config.targets, pairs)


def canonical(shards: list[Shard], flats: list[Tensor]) -> dict[str, Tensor]:
    """Full matrices from every TP rank's flat buffer. Pure: flats[r] is rank r's [num_local]."""
    full = {}
    for shard in shards:
        parts = [shard.view(flat) for flat in flats]
        full[shard.key] = (parts[0] if shard.split_dim is None else torch.cat(parts, shard.split_dim)).contiguous()
    return full


def gather(shards: list[Shard], flat: Tensor, runtime: Runtime) -> dict[str, Tensor]:
    """The full matrices of one buffer on the CPU of global rank 0; an empty dict elsewhere."""
    if runtime.dp_rank != 0:
        return {}  # every copy is the same; the first one writes
    flats = [flat]
    if runtime.layout.tp_size > 1:
        flats = [torch.empty_like(flat) for _ in range(runtime.layout.tp_size)]
        dist.all_gather(flats, flat, group=runtime.tp_group)
    if runtime.global_rank != 0:
        return {}
    # clone: safetensors refuses tensors that share storage, as views of one buffer do
    return {key: x.clone() for key, x in canonical(shards, [x.cpu() for x in flats]).items()}


def read_into(adapter: Adapter, flat: Tensor, file: Any, suffix: str) -> None:
    for shard in adapter.shards:
        shard.view(flat).copy_(_read_shard(file, shard, shard.key + suffix, adapter.tp_rank))


def _read_shard(file: Any, shard: Shard, key: str, tp_rank: int) -> Tensor:
    if shard.split_dim is None:
        return file.get_tensor(key)
    size = shard.local_shape[shard.split_dim]
    rows = slice(tp_rank * size, (tp_rank + 1) * size)
    view = file.get_slice(key)
    return view[rows] if shard.split_dim == 0 else view[:, rows]


def _expected_shapes(wanted: list[Projection], rank: int) -> Mapping[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for projection in wanted:
        shapes[peft_key(projection.path, "A")] = (rank, projection.d_in)
        shapes[peft_key(projection.path, "B")] = (projection.d_out, rank)
    return shapes


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read {path}: {error}. Give a folder that a save of this kind completed.") from error
