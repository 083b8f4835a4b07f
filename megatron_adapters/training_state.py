"""An adapter's whole training state in memory and back: what a worker's snapshot is made of.

Weights and Adam's moments are canonical full matrices (adapter_files.py). Gradients of passes since the last optimizer
step are kept twice, because they are sums that nobody has added up yet (grad_sync.py):

    gradients.safetensors   <key>           the whole gradient, for another layout
                            rank.<r>        float32 [num_local], rank r's own share, for the same layout to the bit
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .adapter_files import GRADIENTS_FILE, HostCopy, collect, gather, gather_matrices, peft_config, read_into
from .adapter_tensors import AdapterTensors
from .adapters import Adapter, LoraWeights, peft_key
from .families import Architecture
from .grad_sync import keep_one_share, sum_gradients
from .runtime import Runtime


def copy_adapter(adapter: Adapter, runtime: Runtime, arch: Architecture, *, base_model: str) -> HostCopy:
    """Everything of the adapter that later results depend on.

    Collectives: those of adapter_files.collect; with pending gradients also those of grad_sync.sum_gradients and
        adapter_files.gather, and a gather of every rank's share over the control group.
    """
    copy = collect(adapter, runtime, arch, optimizer=True, base_model=base_model)
    if not adapter.has_gradients:
        return copy
    whole = adapter.grads.clone()
    sum_gradients(adapter, runtime, whole)
    gradients = gather(adapter.lora, whole, runtime, arch)
    shares = _gather_shares(adapter.grads, runtime)
    return replace(copy, gradients=gradients | {f"rank.{rank}": share for rank, share in enumerate(shares)})


def restore_gradients(adapter: Adapter, folder: Path, runtime: Runtime, *, same_layout: bool) -> None:
    """Give a freshly loaded adapter the pending gradients in `folder`, if there are any.

    Raises: WeightsError. Collectives: none.
    """
    if not (folder / GRADIENTS_FILE).exists():
        return
    with AdapterTensors(folder / GRADIENTS_FILE) as file:
        if same_layout:
            adapter.grads.copy_(file.read(f"rank.{runtime.global_rank}"))
        else:
            read_into(adapter, adapter.grads, file, "")
            keep_one_share(adapter, runtime)
    adapter.has_gradients = True


def copy_snapshot(weights: LoraWeights, arch: Architecture, runtime: Runtime, *, base_model: str) -> HostCopy:
    """A sampling snapshot, in the compute dtype; nothing is allocated on the device, whose memory may be short.

    Collectives: those of adapter_files.gather_matrices.
    """
    held = {
        peft_key(path, letter): part
        for path, pair in weights.pairs.items()
        for letter, part in zip("AB", pair, strict=True)
    }
    config = peft_config(weights.rank, weights.alpha, weights.targets, base_model)
    return HostCopy(config, gather_matrices(weights, held, runtime.dtype, runtime, arch), {}, 0)


def _gather_shares(grads: Tensor, runtime: Runtime) -> list[Tensor]:
    """Every rank's buffer, on rank 0; an empty list elsewhere. Ranks may hold different numbers of entries."""
    own = grads.to("cpu", copy=True)
    world_size = runtime.layout.world_size
    if world_size == 1:
        return [own]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([own.numel()]), group=runtime.control_group)
    if runtime.global_rank != 0:
        dist.send(own, 0, group=runtime.control_group)
        return []
    shares = [own]
    for rank in range(1, world_size):
        shares.append(torch.empty(int(sizes[rank]), dtype=own.dtype))
        dist.recv(shares[-1], rank, group=runtime.control_group)
    return shares
