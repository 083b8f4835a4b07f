"""What a rank refuses, and sets, before it joins the others."""

from __future__ import annotations

import pytest
import torch

from megatron_adapters import runtime
from megatron_adapters.interface import Layout
from tinker_hpc.errors import ConfigError


class Joined(Exception):
    """Whether on CUDA."""


def join(world_size: int, cuda: bool) -> None:
    raise Joined(cuda)


def test_a_job_with_gpus_does_not_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "_join", join)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=0,1\), but torch .*section 1.*gpus_per_node=0"):
        runtime.start(Layout())


def test_float32_on_a_gpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    monkeypatch.setattr(runtime, "initialize_rng_tracker", lambda inference_rng_tracker: None)
    monkeypatch.setattr(runtime, "_join", join)
    torch.backends.cuda.matmul.allow_tf32 = True  # what the variable does
    try:
        with pytest.raises(Joined, match="True"):
            runtime.start(Layout())
        assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("none", [None, "", "-1", "NoDevFiles"])
def test_a_job_without_gpus_runs_on_the_cpu(none: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "_join", join)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if none is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    with pytest.raises(Joined, match="False"):
        runtime.start(Layout())
