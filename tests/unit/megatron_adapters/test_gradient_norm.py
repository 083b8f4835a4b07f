"""The sum of squares of a long gradient: as in float64, and without a float64 copy of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_adapters import grad_sync


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU: there the sum is taken in another way."""

    device = torch.device("cuda")  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [torch.Tensor, OnGpu])
@pytest.mark.parametrize("length", [0, 1, 1000, 2**22, 2**22 + 3, 3 * 2**22 + 1])
def test_it_is_the_sum_in_float64(length: int, kind: type[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    vector = torch.randn(length, generator=torch.Generator().manual_seed(length)) * 1e-3
    exact = float(vector.double().square().sum())
    norm, widened = torch.linalg.vector_norm, []

    def spy(piece: torch.Tensor, **options: Any) -> torch.Tensor:
        widened.append(piece.numel())
        return norm(piece, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", spy)
    found = grad_sync._sum_of_squares(vector.as_subclass(kind))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(exact, rel=1e-12 if kind is OnGpu else 1e-6)  # float32 inside pieces
    assert max(widened, default=0) <= 2**22, "CUDA's norm in float64 copies what it is given: 8 bytes each"
