"""Which GPUs' grouped kernel is asked for what; a GPU's name and answers are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_adapters import grouped
from megatron_adapters.grouped import Groups, trains_by_kernel


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(("capability", "trains"), [((8, 0), True), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_gradients_of_matrices_are_not_blackwells(
    capability: tuple[int, int], trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, capability)
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0")
    assert trains_by_kernel(x) is trains
    x.dtype = torch.float32
    assert not trains_by_kernel(x)


def test_only_what_is_trained_there_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(x: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        calls.append(offs.tolist())
        return x.new_zeros(len(x), weights.shape[2])

    on_a_gpu(monkeypatch, (10, 0))
    monkeypatch.setattr(grouped, "by_kernel", lambda x: True)
    monkeypatch.setattr(F, "grouped_mm", kernel)
    x_NI, weight_EOI = torch.randn(5, 8), torch.randn(3, 8, 8, requires_grad=True)
    groups = Groups(torch.tensor([2, 0, 3]))
    grouped.grouped(x_NI, weight_EOI, groups).sum().backward()
    assert calls == []
    gradient = weight_EOI.grad
    assert gradient is not None and not gradient[1].any()
    torch.testing.assert_close(gradient[2], x_NI[2:].sum(0).expand(8, 8))
    with torch.no_grad():
        grouped.grouped(x_NI, weight_EOI, groups)
    assert calls == [[2, 2, 5]]
