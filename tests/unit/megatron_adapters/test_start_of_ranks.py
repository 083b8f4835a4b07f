"""What a rank refuses, and sets, before it joins the others."""

from __future__ import annotations

import pytest
import torch

from megatron_adapters import runtime
from megatron_adapters.interface import Layout
from tinker_hpc.errors import ConfigError


def test_a_job_with_gpus_does_not_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "_join", lambda world_size, cuda: pytest.fail("joined"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=0,1\), but torch .*section 1.*gpus_per_node=0"):
        runtime.start(Layout())


@pytest.mark.parametrize("none", [None, "", "-1", "NoDevFiles"])
def test_a_job_without_gpus_runs_on_the_cpu(none: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Joined(Exception):
        pass

    def join(world_size: int, cuda: bool) -> None:
        raise Joined(cuda)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "_join", join)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if none is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    with pytest.raises(Joined, match="False"):
        runtime.start(Layout())
