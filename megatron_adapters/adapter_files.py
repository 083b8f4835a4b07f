"""Adapters on disk: PEFT's files with canonical full matrices, so that any layout loads any other's.

adapter_model.safetensors   base_model.model.<path>.lora_{A,B}.weight, float32, exactly PEFT's names and shapes; experts
                            stacked (adapter_tensors.py), which an export turns into PEFT's
adapter_config.json         PEFT's LoraConfig
optimizer.safetensors       <the same key>.exp_avg and .exp_avg_sq; metadata "step"
gradients.safetensors       in a worker's snapshots alone, see training_state.py
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinker_hpc.errors import WeightsError
from tinker_hpc.peft_export import BASE_EXPERTS, FUSED

from .adapter_tensors import AdapterTensors
from .adapters import Adapter, LoraPair, LoraWeights, Shard, peft_key, shard_layout
from .families import Architecture
from .interface import Layout
from .placement import Place, place_of, stage_layers
from .projections import EXPERT_NAMES, MLP, UNEMBED, attention_names, projections
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
    per_expert: bool = False


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
    fused_experts: bool = False
    """of the base (`Experts.fused`), said in the file for whoever exports it"""

    def write(self, folder: Path) -> None:
        """Write the files; no collective. Raises: OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        about_base = {BASE_EXPERTS: FUSED} if self.fused_experts else {}
        _write(self.weights, folder / WEIGHTS_FILE, {"format": "pt", **about_base})
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        if self.moments:
            _write(self.moments, folder / OPTIMIZER_FILE, {"format": "pt", "step": str(self.step)})
        if self.gradients:
            _write(self.gradients, folder / GRADIENTS_FILE, {"format": "pt"})


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Raises: OSError; safetensors 0.8 says what the disk said only in its own error's words."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if (said := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(said[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def collect(adapter: Adapter, runtime: Runtime, arch: Architecture, *, optimizer: bool, base_model: str) -> HostCopy:
    """The adapter as it is now; what happens to it afterwards does not show in the copy.

    Collectives: `gather` of each buffer.
    """
    lora = adapter.lora
    weights = gather(lora, adapter.weights, runtime, arch)
    moments: dict[str, Tensor] = {}
    if optimizer:
        for name, flat in (("exp_avg", adapter.exp_avg), ("exp_avg_sq", adapter.exp_avg_sq)):
            moments |= {f"{key}.{name}": x for key, x in gather(lora, flat, runtime, arch).items()}
    config = peft_config(lora.rank, lora.alpha, lora.targets, base_model)
    fused = arch.experts is not None and arch.experts.fused
    return HostCopy(config, weights, moments, adapter.step, fused_experts=fused)


def save(
    adapter: Adapter, runtime: Runtime, arch: Architecture, folder: Path, *, optimizer: bool, base_model: str
) -> None:
    """Write the adapter into `folder`; rank 0 writes.

    Raises: OSError, on every rank, if rank 0 could not write.
    Collectives: those of `collect`; then one broadcast over the control group, after which the files are there.
    """
    copy = collect(adapter, runtime, arch, optimizer=optimizer, base_model=base_model)
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
    with AdapterTensors(folder / WEIGHTS_FILE) as file:
        found = file.shapes()
    paths = [key.removeprefix(PREFIX).removesuffix(SUFFIX_A) for key in found if key.endswith(SUFFIX_A)]
    present = {path.rsplit(".", 1)[-1] for path in paths}
    known = attention_names(arch) + MLP + UNEMBED
    targets = tuple(name for name in known if name in present or EXPERT_NAMES.get(name) in present)
    per_expert = any(found[key][0] > 1 for key in found if ".experts.w" in key and "w2" not in key and "lora_A" in key)
    per_expert |= any(found[key][0] > 1 for key in found if key.endswith(".experts.w2.lora_B.weight"))
    check_tensors(found, _expected_shapes(arch, targets, config["r"], per_expert), str(folder / WEIGHTS_FILE))
    return AdapterConfig(config["r"], float(config["lora_alpha"]), targets, per_expert)


@torch.no_grad()
def load(adapter: Adapter, arch: Architecture, folder: Path, *, optimizer: bool) -> None:
    """Fill a freshly built adapter of the right rank and targets; without `optimizer` its moments stay zero.

    Raises: WeightsError; with optimizer=True also if there is no optimizer state. Collectives: none.
    """
    if not optimizer:
        with AdapterTensors(folder / WEIGHTS_FILE) as file:
            read_into(adapter, adapter.weights, file, "")
        return
    lora = adapter.lora
    # Look at the second file before the first is copied: a failed load must leave the adapter as it was.
    with AdapterTensors(folder / OPTIMIZER_FILE) as file:
        shapes = _expected_shapes(arch, lora.targets, lora.rank, lora.per_expert)
        expected = {f"{key}.{name}": shape for key, shape in shapes.items() for name in ("exp_avg", "exp_avg_sq")}
        check_tensors(file.shapes(), expected, str(folder / OPTIMIZER_FILE))
        read_into(adapter, adapter.exp_avg, file, ".exp_avg")
        read_into(adapter, adapter.exp_avg_sq, file, ".exp_avg_sq")
        adapter.step = int(file.metadata["step"])
    with AdapterTensors(folder / WEIGHTS_FILE) as file:
        read_into(adapter, adapter.weights, file, "")


def load_snapshot(
    folder: Path, arch: Architecture, config: AdapterConfig, runtime: Runtime, layers: Sequence[int]
) -> LoraWeights:
    """This rank's frozen copy of the adapter in `folder`, in the compute dtype; no optimizer state is allocated.

    Args: layers: those of this rank's stage.
    """
    wanted = projections(arch, config.targets, per_expert=config.per_expert, layers=layers)
    shards = {shard.key: shard for shard in shard_layout(wanted, config.rank, runtime.layout)}
    with AdapterTensors(folder / WEIGHTS_FILE) as file:

        def read(path: str, letter: str) -> Tensor:
            key = peft_key(path, letter)
            part = file.read(key, shards[key].slice_of(runtime.place))
            # Through float32 whatever is stored, as a trained adapter goes.
            # Copied also where nothing changes: the file is mapped, may be deleted, and its numbers lie at any address,
            # on which the last bits of a product depend (MKL with AVX2).
            return part.to(torch.float32).to(device=runtime.device, dtype=runtime.dtype, copy=True)

        pairs = {p.path: LoraPair(read(p.path, "A"), read(p.path, "B")) for p in wanted}
    return LoraWeights(config.rank, config.alpha, config.targets, pairs, config.per_expert)


def owned(shards: Sequence[Shard], place: Place) -> list[Shard]:
    """Those of a stage's shards that this rank gives to a file: each part of each matrix has one owner. Pure."""
    first_copy = place.dp_rank == 0
    owns = {None: first_copy and place.tp_rank == 0, "tp": first_copy, "ep": place.expert_copy == 0}
    return [
        shard
        for shard in shards
        if (first_copy and place.tp_rank % shard.copies == 0 if shard.axis == "kv" else owns[shard.axis])
    ]


def assemble(parts: Mapping[int, Tensor], stages: Sequence[Sequence[Shard]], layout: Layout) -> dict[str, Tensor]:
    """Full matrices from what each rank owns. Pure.

    Args:
        parts: global rank -> its owned shards, one after the other, on the CPU; ranks that own none are absent.
        stages: the shards of each pipeline stage.
    """
    full: dict[str, Tensor] = {}
    for rank, flat in parts.items():
        place = place_of(rank, layout)
        mine = owned(stages[place.pp_rank], place)
        for shard, values in zip(mine, flat.split([shard.size for shard in mine]), strict=True):
            if shard.key not in full:
                full[shard.key] = torch.empty(shard.full_shape, dtype=flat.dtype)
            full[shard.key][shard.slice_of(place)] = replace(shard, offset=0).held(values, place)
    return full


def own_part(mine: Sequence[Shard], held: Mapping[str, Tensor], place: Place, dtype: torch.dtype) -> Tensor:
    """What a rank gives to a file, on the CPU: `mine` one after the other, as the buffers have them.

    One matrix after the other, since this is also how a snapshot leaves a device whose memory is short: a copy of them
    all would not fit there.
    """
    sizes = [shard.size for shard in mine]
    part = torch.empty(sum(sizes), dtype=dtype)
    for shard, values in zip(mine, part.split(sizes), strict=True):
        replace(shard, offset=0).held(values, place).copy_(held[shard.key])
    return part


def gather(lora: LoraWeights, flat: Tensor, runtime: Runtime, arch: Architecture) -> dict[str, Tensor]:
    """The full matrices of one buffer on the CPU of global rank 0; an empty dict elsewhere.

    Args: flat: this rank's buffer of the layout that `lora` has here (shard_layout), any dtype.
    Collectives: those of gather_matrices.
    """
    place = runtime.place
    held = {shard.key: shard.held(flat, place) for shard in stage_shards(lora, arch, runtime.layout, place.pp_rank)}
    return gather_matrices(lora, held, flat.dtype, runtime, arch)


def gather_matrices(
    lora: LoraWeights, held: Mapping[str, Tensor], dtype: torch.dtype, runtime: Runtime, arch: Architecture
) -> dict[str, Tensor]:
    """The full matrices on the CPU of global rank 0; an empty dict elsewhere.

    Args: held: by PEFT's name what this rank has of each of `lora`'s matrices, without padding, of one dtype.
    Collectives: over the control group, one message to rank 0 from every other rank that owns something.
    """
    layout = runtime.layout
    stages = [stage_shards(lora, arch, layout, pp_rank) for pp_rank in range(layout.pp_size)]
    mine = owned(stages[runtime.place.pp_rank], runtime.place)
    part = own_part(mine, held, runtime.place, dtype) if mine else None
    if runtime.global_rank != 0:
        if part is not None:
            dist.send(part, group=runtime.control_group, group_dst=0)
        return {}
    parts = {0: part} if part is not None else {}
    for rank in range(1, layout.world_size):
        place = place_of(rank, layout)
        if num := sum(shard.size for shard in owned(stages[place.pp_rank], place)):
            parts[rank] = torch.empty(num, dtype=dtype)
            dist.recv(parts[rank], group=runtime.control_group, group_src=rank)
    return assemble(parts, stages, layout)


def stage_shards(lora: LoraWeights, arch: Architecture, layout: Layout, pp_rank: int) -> list[Shard]:
    """The buffers' layout of this adapter on the ranks of a stage."""
    layers = stage_layers(arch.num_layers, layout, pp_rank)
    wanted = projections(arch, lora.targets, per_expert=lora.per_expert, layers=layers)
    return shard_layout(wanted, lora.rank, layout)


def read_into(adapter: Adapter, flat: Tensor, file: AdapterTensors, suffix: str) -> None:
    for shard in adapter.shards:
        shard.held(flat, adapter.place).copy_(file.read(shard.key + suffix, shard.slice_of(adapter.place)))


def _expected_shapes(
    arch: Architecture, targets: tuple[str, ...], rank: int, per_expert: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for projection in projections(arch, targets, per_expert=per_expert):
        shapes[peft_key(projection.path, "A")] = projection.shape_a(rank)
        shapes[peft_key(projection.path, "B")] = projection.shape_b(rank)
    return shapes
