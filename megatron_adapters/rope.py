"""Rotary position embedding with the exact frequencies and scaling of transformers.

megatron-core hardcodes Llama 3's scaling constants, so its own rope is switched off (position_embedding_type "none")
and attention.py rotates queries and keys itself, at explicit positions.
Su et al. 2021, arXiv:2104.09864; scaled variants: transformers/modeling_rope_utils.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Cosine and sine at any positions. Kept in float32 whatever the model's dtype: bf16 angles lose positions."""

    def __init__(self, hf_config: Any, head_dim: int, device: torch.device) -> None:
        inverse_frequencies, scaling = _frequencies(hf_config, head_dim)
        self.inverse_frequencies = inverse_frequencies.to(device=device, dtype=torch.float32)  # [head_dim / 2]
        self.scaling = float(scaling)

    def cos_sin(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Two float32 [T, 1, head_dim], to be broadcast over the heads. positions_T: any integer dtype."""
        angles = positions_T.to(torch.float32)[:, None] * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x_K: Tensor, cos_K: Tensor, sin_K: Tensor) -> Tensor:
    """Rotate the last dimension of x, "half" layout (first and second half form the pairs); dtype of x, float32 inside.

    Args:
        x_K: [..., K], for instance [tokens, heads, head_dim].
        cos_K, sin_K: of `cos_sin`, in a shape that is broadcast to x. Their halves are equal.
    """
    if torch.is_grad_enabled() and x_K.requires_grad:
        return _Rotate.apply(x_K, cos_K, sin_K)  # type: ignore[no-any-return]
    return _rotated(x_K, cos_K, sin_K, backwards=False)


def signed_sin(sin_K: Tensor) -> Tensor:
    """As `rotate_by_roll` takes it: negative in the first half."""
    first, second = sin_K.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotate_by_roll(x_K: Tensor, cos_K: Tensor, signed_sin_K: Tensor) -> Tensor:
    """`rotate` where no gradient is wanted, in 3 operations instead of 10: for few rows their number is what counts.

    An operation that comes after a layer's weights went through the caches costs 20 microseconds on a CPU.
    """
    x = x_K.float()
    return (x * cos_K).addcmul_(x.roll(x.shape[-1] // 2, -1), signed_sin_K).to(x_K.dtype)


def _rotated(x_K: Tensor, cos_K: Tensor, sin_K: Tensor, *, backwards: bool) -> Tensor:
    """The same roundings as (x * cos) + (rotate_half(x) * sin), with a third of its fresh memory."""
    x = x_K.float()
    out = x * cos_K
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    sin = sin_K[..., : first.shape[-1]]
    out_first.sub_(second * sin, alpha=-1 if backwards else 1)
    out_second.add_(first * sin, alpha=-1 if backwards else 1)
    return out.to(x_K.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back (times the same scaling)."""

    @staticmethod
    def forward(ctx: Any, x_K: Tensor, cos_K: Tensor, sin_K: Tensor) -> Tensor:
        ctx.save_for_backward(cos_K, sin_K)
        return _rotated(x_K, cos_K, sin_K, backwards=False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad_outputs[0], *ctx.saved_tensors, backwards=True), None, None


def _frequencies(hf_config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cos and sin."""
    parameters = hf_config.rope_parameters  # transformers 5; `rope_theta` is gone from the top level
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
