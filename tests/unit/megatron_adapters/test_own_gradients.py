"""Functions that write their own backward, beside finite differences in float64 and autograd of the plain formula."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adapters.adapters import LoraPair, LoraWeights
from megatron_adapters.attention import PackedContext, packed_attention
from megatron_adapters.lora_linear import Segment
from megatron_adapters.lora_stack import Stack, as_one
from megatron_adapters.lora_training import Frozen, adapted_linear
from megatron_adapters.rms_norm import rms_norm
from megatron_adapters.rope import rotate
from megatron_adapters.swiglu import swiglu


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_norm_and_activation_by_finite_differences() -> None:
    x, weight = _random(5, 3, 8).requires_grad_(), _random(3, 8, seed=1)
    assert torch.autograd.gradcheck(partial(rms_norm, weight_D=weight, eps=1e-6), (x,))
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), None, 1e-6) * weight)
    assert torch.autograd.gradcheck(swiglu, (x,))
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :4]) * x[..., 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_with_and_without_gradients(dtype: torch.dtype) -> None:
    """Bit for bit, in the dtype of x, and a gradient of that dtype."""
    x, weight = _random(5, 8, dtype=torch.float32).to(dtype), _random(8, seed=1).to(dtype)
    angles = _random(5, 4, seed=2, dtype=torch.float32).repeat(1, 2)
    for function in (
        partial(rms_norm, weight_D=weight, eps=1e-6),
        swiglu,
        partial(rotate, cos_K=angles.cos(), sin_K=angles.sin()),
    ):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        assert torch.equal(out, function(x)) and out.dtype == dtype
        out.sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype


def test_rotation_is_undone_by_its_gradient() -> None:
    x, upstream = (_random(6, 2, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    angles = _random(6, 1, 4, seed=2, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos() * 1.5, angles.sin() * 1.5  # scaled, as with YaRN
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    rotate(ours, cos, sin).backward(upstream)
    first, second = theirs.chunk(2, dim=-1)
    (theirs * cos + torch.cat((-second, first), dim=-1) * sin).backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_adapted_linear_by_finite_differences() -> None:
    """Grouped outputs as q, k and v have them; two adapters of unlike rank and targets, one twice; a base-only part."""
    inputs, groups, sizes = 6, 2, (8, 4, 4)
    x, weight, bias = _random(9, inputs).requires_grad_(), _random(16, inputs, seed=1), _random(16, seed=2)

    def split(out: Tensor) -> list[Tensor]:
        return list(out.view(len(out), groups, -1).split([size // groups for size in sizes], dim=-1))

    def pair(place: int, rank: int) -> LoraPair:
        a, b = _random(rank, inputs, seed=3 + place), _random(sizes[place], rank, seed=13 + place)
        return LoraPair(a.requires_grad_(), b.requires_grad_())

    one = LoraWeights(2, 3.0, (), {"q": pair(0, 2), "k": pair(1, 2), "v": pair(2, 2)})
    other = LoraWeights(1, 5.0, (), {"v": pair(2, 1), "elsewhere": pair(0, 1)})
    segments = [Segment(one, 0, 2), Segment(None, 2, 4), Segment(other, 4, 7), Segment(one, 7, 9)]

    def ours(x: Tensor) -> Tensor:
        return adapted_linear(x, Frozen(weight, bias), segments, ("q", "k", "v"), split)

    def plain(x: Tensor) -> Tensor:
        rows = []
        for lora, start, end in segments:
            updates = [torch.zeros(end - start, groups, size // groups, dtype=x.dtype) for size in sizes]
            for place, path in enumerate(("q", "k", "v")):
                if lora is not None and path in lora.pairs:
                    a, b = lora.pairs[path]
                    updates[place] = (lora.scaling * x[start:end] @ a.t() @ b.t()).view_as(updates[place])
            rows.append(torch.cat(updates, dim=-1).flatten(1))
        return F.linear(x, weight, bias) + torch.cat(rows)

    assert torch.autograd.gradcheck(ours, (x,))
    torch.testing.assert_close(ours(x), plain(x))
    trained = [matrix for lora, paths in ((one, "qkv"), (other, "v")) for path in paths for matrix in lora.pairs[path]]
    upstream = _random(9, 16, seed=30)
    expected = torch.autograd.grad(plain(x), trained, upstream)
    for matrix in trained:
        matrix.grad = None
    for times in (1, 2):  # the second time it is added to the first
        ours(x.detach()).backward(upstream)  # as in the first layer: its input wants no gradient
        for matrix, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(matrix.grad, times * gradient)


@pytest.mark.parametrize("in_one_buffer", [True, False])
def test_neighbouring_matrices_are_one_without_a_copy(in_one_buffer: bool) -> None:
    flat = _random(4 * 6)
    matrices = [flat[:12].view(2, 6), flat[12:18].view(1, 6), flat[18:].view(1, 6)]
    if not in_one_buffer:
        matrices[1] = matrices[1].clone()
    whole = as_one(matrices)
    assert (whole is not None) == in_one_buffer
    pairs = {str(place): LoraPair(matrix, matrix) for place, matrix in enumerate(matrices)}
    stack = Stack(LoraWeights(2, 2.0, (), pairs), tuple(pairs))
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(stack.a_WI(dtype), torch.cat(matrices).to(dtype))
    if whole is not None:
        whole[2] = 7.0
        assert (matrices[1] == 7.0).all()
    assert as_one([matrices[1], matrices[0]]) is None, "in the other order they are no matrix"


@pytest.mark.parametrize("bounds", [(0, 4, 8, 12), (0, 3, 6, 12), (0, 12), (0, 5, 6, 7, 12)], ids=str)
def test_neighbours_of_equal_length_attend_as_each_alone(bounds: tuple[int, ...]) -> None:
    """Bit for bit, the gradients too."""
    q, k, v = (_random(12, heads, 8, seed=heads, dtype=torch.float32).requires_grad_() for heads in (4, 2, 2))
    upstream = _random(12, 4, 8, seed=9, dtype=torch.float32)
    out = packed_attention(q, k, v, PackedContext(bounds=bounds))
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for start, end in pairwise(bounds):
        alone = [x.detach()[start:end].clone().requires_grad_() for x in (q, k, v)]
        part = packed_attention(alone[0], alone[1], alone[2], PackedContext(bounds=(0, end - start)))
        assert torch.equal(part, out[start:end])
        for whole, own in zip(grads, torch.autograd.grad(part, alone, upstream[start:end]), strict=True):
            assert torch.equal(whole[start:end], own)
