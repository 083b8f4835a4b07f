"""Causal attention over packed sequences, as megatron-core's `core_attention` module.

Everything a layer needs to know about the packing travels in a `PackedContext`, which megatron-core hands through
unread as its `packed_seq_params`; there is no global state. For decoding, a context carries a `cache`: the module
then rotates q and k at the context's positions and leaves the attending to `cache.attend` (kv_cache.py).

Shapes: T packed tokens (all of them, also under sequence parallelism: megatron-core gathers before q, k, v),
H local query heads, G local key-value heads, P = H / G, K head_dim.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from .rope import RotaryTable, rotate
from .ruled_attention import PLAIN, Rule, ruled_attention


class AttentionCache(Protocol):
    """What decoding plugs in: it stores the new keys and values and attends over all stored ones."""

    def attend(
        self, layer_number: int, q_TGPK: Tensor, k_TGK: Tensor, v_TGK: Tensor, context: PackedContext, /, *, rule: Rule
    ) -> Tensor:
        """Return [T, H, K]. layer_number counts from 1; q and k are already rotated to context.positions_T.

        q_TGPK: see PackedAttention.attend.
        """
        ...


@dataclass
class PackedContext(PackedSeqParams):
    """One packed forward. Build it with `packed_context`."""

    positions_T: Tensor | None = None
    """int64 [T], position of each token in its own sequence"""
    bounds: tuple[int, ...] = ()
    """cu_seqlens as Python numbers: 0, end of the first sequence, ..., T"""
    cos_T1K: Tensor | None = None
    sin_T1K: Tensor | None = None
    cache: AttentionCache | None = None


def packed_context(
    bounds: tuple[int, ...], positions_T: Tensor, rotary: RotaryTable, cache: AttentionCache | None = None
) -> PackedContext:
    """Context of a forward over sequences that end at `bounds`[1:].

    Args:
        bounds: 0 and the end of every packed sequence; the last one is T. With a cache, of the *new* tokens.
        positions_T: int64 [T] on the model's device.
    """
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=positions_T.device)
    longest = max((end - start for start, end in pairwise(bounds)), default=0)
    cos_T1K, sin_T1K = rotary.cos_sin(positions_T)
    return PackedContext(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions_T=positions_T,
        bounds=bounds,
        cos_T1K=cos_T1K,
        sin_T1K=sin_T1K,
        cache=cache,
    )


class PackedAttention(nn.Module):
    """megatron-core's core_attention: rotates, then attends within each packed sequence."""

    def __init__(self, *, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        # Of the architecture; model.py sets them before weights are loaded.
        self.window: int | None = None
        self.sinks_H: nn.Parameter | None = None

    def forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedContext,
        **_: Any,
    ) -> Tensor:
        """Attend; returns [T, H * K]. Collectives: none, heads are independent."""
        context = packed_seq_params
        assert context.cos_T1K is not None and context.sin_T1K is not None
        q_THK = rotate(q_THK, context.cos_T1K, context.sin_T1K)
        k_TGK = rotate(k_TGK, context.cos_T1K, context.sin_T1K)
        return self.attend(q_THK.unflatten(1, (k_TGK.shape[1], -1)), k_TGK, v_TGK, context)

    def attend(self, q_TGPK: Tensor, k_TGK: Tensor, v_TGK: Tensor, context: PackedContext) -> Tensor:
        """As forward, of queries and keys that are rotated; values may have another head dim than they.

        q_TGPK: queries beside the key-value head that they read, P = H / G of each.
        """
        rule = Rule(self.softmax_scale, self.window, self.sinks_H)
        if context.cache is not None:
            out_THK = context.cache.attend(self.layer_number, q_TGPK, k_TGK, v_TGK, context, rule=rule)
        else:
            out_THK = packed_attention(q_TGPK.flatten(1, 2), k_TGK, v_TGK, context, rule)
        return out_THK.flatten(-2)


def packed_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, context: PackedContext, rule: Rule = PLAIN) -> Tensor:
    """Causal attention within each sequence of the context; q and k are rotated. Returns [T, H, K]."""
    scale, value_dim = rule.scale, v_TGK.shape[-1]
    if value_dim != q_THK.shape[-1]:  # most kernels want equal sizes
        scale = rule.scale_of(q_THK.shape[-1])
        v_TGK = F.pad(v_TGK, (0, q_THK.shape[-1] - value_dim))
        return packed_attention(q_THK, k_TGK, v_TGK, context, replace(rule, scale=scale))[..., :value_dim]
    if not rule.is_plain:
        return ruled_attention(q_THK, k_TGK, v_TGK, context.bounds, rule)
    if q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(q_THK, k_TGK, v_TGK, context, scale)
    return _attention_of_runs(q_THK, k_TGK, v_TGK, context.bounds, scale)


def _attention_of_runs(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, bounds: tuple[int, ...], scale: float | None
) -> Tensor:
    """One SDPA call for neighbours of equal length: any device and dtype, memory linear where SDPA's kernel is.

    Split, not sliced: the gradient of a slice is as large as the whole, so that many sequences would cost the square of
    their number.
    """
    grouped = q_THK.shape[1] != k_TGK.shape[1]
    runs = _equal_runs(bounds)
    tokens = [count * length for count, length in runs]
    cut = [x.split(tokens) if len(runs) > 1 else (x,) for x in (q_THK, k_TGK, v_TGK)]
    outputs = []
    for run, *qkv in zip(runs, *cut, strict=True):
        q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(runs) == 1 else torch.cat(outputs)


def _equal_runs(bounds: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbours of equal length: how many, and the length of each. Pure."""
    lengths = (end - start for start, end in pairwise(bounds))
    return [(len(list(run)), length) for length, run in groupby(lengths)]


def _varlen_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, context: PackedContext, scale: float | None
) -> Tensor:
    """torch's FlashAttention over ragged sequences (CUDA, half precision only)."""
    from torch.nn.attention.varlen import varlen_attn

    # Its signature moved: causal is `is_causal` in torch 2.10, window_size=(-1, 0) from 2.12 on.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if scale is not None:
        options["scale"] = scale
    if q_THK.shape[1] != k_TGK.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeats = q_THK.shape[1] // k_TGK.shape[1]
            k_TGK, v_TGK = (x.repeat_interleave(repeats, dim=1) for x in (k_TGK, v_TGK))
    out = varlen_attn(
        q_THK,
        k_TGK,
        v_TGK,
        context.cu_seqlens_q,
        context.cu_seqlens_kv,
        context.max_seqlen_q,
        context.max_seqlen_kv,
        **options,
    )
    assert isinstance(out, Tensor)
    return out
