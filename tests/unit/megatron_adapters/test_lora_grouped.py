"""Grouped products, as CUDA has them, beside the loop over adapters. torch has grouped_mm on CPUs too."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from megatron_adapters import lora_grouped
from megatron_adapters.adapters import LoraPair, LoraWeights
from megatron_adapters.lora_linear import Segment
from megatron_adapters.lora_training import Frozen, adapted_linear

INPUTS, PATHS = 24, {"q": 32, "k": 16, "v": 16}
"""outputs of each projection"""
HEADS = 2


def in_groups(out: Tensor) -> list[Tensor]:
    """As queries, keys and values lie."""
    sizes = [size // HEADS for size in PATHS.values()]
    return list(out.view(len(out), HEADS, -1).split(sizes, dim=-1))


def side_by_side(out: Tensor) -> list[Tensor]:
    """As gate and up lie."""
    return list(out.split(list(PATHS.values()), dim=-1))


def adapter(rank: int, alpha: float, paths: str) -> LoraWeights:
    pairs = {
        path: LoraPair(
            torch.randn(rank, INPUTS).requires_grad_(), (torch.randn(PATHS[path], rank) / rank).requires_grad_()
        )
        for path in paths
    }
    return LoraWeights(rank, alpha, (), pairs)


def random_segments() -> list[Segment]:
    """Ranks below, at and above the alignment; some without a projection; tokens of the base alone, first and last."""
    adapters = [adapter(1, 32.0, "qkv"), adapter(8, 4.0, "kv"), adapter(19, 32.0, "qv"), adapter(3, 1.0, "q")]
    loras = [None, adapters[0], adapters[1], None, adapters[2], adapters[3], adapters[0], None]
    bounds = accumulate((3, 5, 1, 2, 17, 4, 6, 2), initial=0)
    return [Segment(lora, *ends) for lora, ends in zip(loras, pairwise(bounds), strict=True)]


def run(segments: list[Segment], split: Callable[[Tensor], list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Output, gradient of the input, gradients of all matrices; two passes are summed."""
    torch.manual_seed(1)
    tokens, outputs = segments[-1].end, sum(PATHS.values())
    x = torch.randn(tokens, INPUTS).to(dtype).requires_grad_()
    frozen = Frozen(torch.randn(outputs, INPUTS).to(dtype), torch.randn(outputs).to(dtype))
    upstream = torch.randn(tokens, outputs).to(dtype)
    adapters = {id(segment.lora): segment.lora for segment in segments if segment.lora is not None}
    matrices = [matrix for lora in adapters.values() for pair in lora.pairs.values() for matrix in pair]
    for matrix in matrices:
        matrix.grad = None
    for _ in range(2):
        out = adapted_linear(x, frozen, segments, tuple(PATHS), split)
        out.backward(upstream)
    found = [out.detach(), x.grad, *(matrix.grad for matrix in matrices)]
    assert all(value is not None for value in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("split", [in_groups, side_by_side])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loops_numbers(
    split: Callable[[Tensor], list[Tensor]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    segments = random_segments()
    loop = run(segments, split, dtype)
    exact = loop if dtype == torch.float32 else run(segments, split, torch.float32)
    used = []

    def is_better(x: Tensor, weight: Tensor, num_parts: int) -> bool:
        used.append(num_parts)
        return True

    monkeypatch.setattr(lora_grouped, "is_better", is_better)
    grouped = run(segments, split, dtype)
    assert used == [5, 5]
    for ours, theirs, truth in zip(grouped, loop, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, of_loop = ((x.float() - truth).norm() / truth.norm() for x in (ours, theirs))
        assert error < (2e-6 if dtype == torch.float32 else 1.3 * of_loop + 1e-3), (error, of_loop)


def test_only_gpus_in_half_precision_group() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not lora_grouped.is_better(torch.zeros(2, 8, dtype=dtype), torch.zeros(16, 8, dtype=dtype), 8)
