"""What megatron-core 0.16.1 needs to run on a machine without CUDA. Nothing here is installed where CUDA exists."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker


def install() -> None:
    """Patch this process; calling it again changes nothing."""
    # mappings.py and others allocate with device=torch.cuda.current_device(), which asserts a driver.
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    # The default tracker saves CUDA generator states at every fork(); this one's fork() does nothing, which is right
    # for us on any device: no dropout anywhere, and initial weights are loaded, not drawn.
    initialize_rng_tracker(inference_rng_tracker=True)


def _cpu_device() -> torch.device:
    return torch.device("cpu")
