"""The forms of norm and rotation that sampling uses: the numbers of those that training uses."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_adapters.rms_norm import FrozenNorm, rms_norm
from megatron_adapters.rope import rotate, rotate_by_roll, signed_sin

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 0.0)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("weight_shape", [(64,), (3, 64)], ids=str)
def test_frozen_norm(weight_shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """Also of zeros, and of numbers as small as the square root of eps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 3, 64, generator=generator).to(dtype)
    x[0], x[1] = 0, x[1] * 1e-3
    weight = torch.randn(weight_shape, generator=generator).to(dtype)
    out = FrozenNorm(lambda: weight, 1e-6)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, rms_norm(x, weight, 1e-6), atol=tolerance, rtol=tolerance)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    rounding = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out.double(), exact, atol=rounding, rtol=rounding)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_rotate_by_roll(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 3, 64, generator=generator).to(dtype)
    angles = torch.rand(5, 1, 1, 32, generator=generator) * 2 * math.pi
    cos, sin = (torch.cat((half, half), dim=-1) for half in (angles.cos(), angles.sin()))
    out = rotate_by_roll(x, cos, signed_sin(sin))
    assert out.dtype == dtype
    # One product may be added without being rounded before.
    torch.testing.assert_close(out, rotate(x, cos, sin), atol=max(tolerance, 2**-7 * (dtype != torch.float32)), rtol=0)
    turned = torch.complex(x[..., :32].double(), x[..., 32:].double()) * torch.polar(torch.ones(1), angles)
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    rounding = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(out.double(), exact, atol=rounding, rtol=rounding)
