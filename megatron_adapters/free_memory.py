"""What this rank may still allocate on its device."""

from __future__ import annotations

import os

import torch

from .host_memory import free_host_memory


def free_memory(device: torch.device) -> int:
    """Bytes: of a GPU what is free and what torch's allocator has in reserve; of a CPU's memory, what is free to this
    node's or job's processes, divided among the node's ranks.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
