"""The frozen product equals F.linear and autograd's gradient, whichever library computes it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_adapters import frozen_linear as module
from megatron_adapters.frozen_linear import frozen_linear, frozen_linear_grad


@pytest.fixture(autouse=True, params=[True, False], ids=["onednn", "blas"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two trains depends on the machine."""
    monkeypatch.setattr(module, "_TRAINS_BY_ONEDNN", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 48), (33, 1, 48), (1, 48)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_f_linear_forward_and_backward(dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(80, 48, generator=generator).to(dtype)
    bias = torch.randn(80, generator=generator).to(dtype) if with_bias else None
    upstream = torch.randn((*shape[:-1], 80), generator=generator).to(dtype)

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = frozen_linear(ours, weight, bias), F.linear(theirs, weight, bias)
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(out, expected, **tolerance)
    out.add_(1.0)  # as an adapter's update is added
    out.backward(upstream)
    expected.backward(upstream)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    torch.testing.assert_close(frozen_linear_grad(upstream, weight), theirs.grad, **tolerance)
    with torch.no_grad():
        for _ in range(2):  # the second time with the weight in its other layout
            torch.testing.assert_close(frozen_linear(x, weight, bias), expected, **tolerance)


def test_a_slice_of_the_rows_is_no_special_case() -> None:
    x, weight = torch.randn(20, 16), torch.randn(12, 16)
    with torch.no_grad():
        torch.testing.assert_close(frozen_linear(x.t().contiguous().t()[3:9], weight), x[3:9] @ weight.t())


def test_two_weights_of_one_size_are_not_confused() -> None:
    x = torch.randn(4, 16)
    with torch.no_grad():
        for _ in range(5):  # each is freed before the next, which may then have its address
            weight = torch.randn(12, 16)
            torch.testing.assert_close(frozen_linear(x, weight), x @ weight.t())
