"""Attention with more than a causal mask: a window of the last tokens, and sinks.

A *sink* is a number per head that takes part in the softmax like the score of one more key, whose value is zero
(gpt-oss). It is computed as such a key: queries and keys get `_EXTRA` more elements, of which the first is 1 in every
query and sink / scale in the sink's key. So any kernel of torch's scaled_dot_product_attention does it, and none keeps
the scores. Queries go in chunks, each with the keys it can see, so that masks stay small and a window costs no more
than its width.

Shapes: T tokens of a sequence, H query heads, G key-value heads, K head dim, C queries of a chunk, J keys they may see;
while decoding N lanes, L cached tokens, Q queries of a key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024
_EXTRA = 8  # one is needed; CUDA's kernels want a multiple of eight


@dataclass(frozen=True)
class Rule:
    """What a layer's attention does beside the causal softmax."""

    scale: float | None = None
    """of the scores; None: 1 / sqrt(head dim)"""
    window: int | None = None
    """a token sees this many last tokens, itself included"""
    sinks_H: Tensor | None = None
    """this rank's heads; frozen"""

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.sinks_H is None

    def scale_of(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale


PLAIN = Rule()


def ruled_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, bounds: tuple[int, ...], rule: Rule) -> Tensor:
    """Attend within each sequence that ends at bounds[1:]; returns [T, H, K]. Differentiable in q, k and v."""
    head_dim, scale = q_THK.shape[-1], rule.scale_of(q_THK.shape[-1])
    repeats = q_THK.shape[1] // k_TGK.shape[1]
    if repeats > 1:  # not every kernel that takes a mask takes grouped heads
        k_TGK, v_TGK = (x.repeat_interleave(repeats, dim=1) for x in (k_TGK, v_TGK))
    sink_1HK = None
    if rule.sinks_H is not None:
        q_THK = torch.cat((q_THK, _first_is(torch.ones_like(q_THK[..., :1]))), dim=-1)
        k_TGK, v_TGK = F.pad(k_TGK, (0, _EXTRA)), F.pad(v_TGK, (0, _EXTRA))
        sink_1HK = F.pad(_first_is(rule.sinks_H.to(q_THK.dtype)[None, :, None] / scale), (head_dim, 0))
    outputs = []
    for start, end in pairwise(bounds):
        for first in range(start, end, _CHUNK):
            last = min(first + _CHUNK, end)
            oldest = start if rule.window is None else max(start, first - rule.window + 1)
            q, k, v = q_THK[first:last], k_TGK[oldest:last], v_TGK[oldest:last]
            mask_CJ = _visible(first, last, oldest, rule.window, q.device)
            if sink_1HK is not None:
                k, v = torch.cat((sink_1HK, k)), torch.cat((torch.zeros_like(sink_1HK), v))
                mask_CJ = F.pad(mask_CJ, (1, 0), value=True)
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_CJ, scale=scale)
            outputs.append(out[0].transpose(0, 1)[..., :head_dim])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def ruled_decode(
    query_NGQK: Tensor, keys_NGLK: Tensor, values_NGLK: Tensor, *, mask_NL: Tensor, positions_N: Tensor, rule: Rule
) -> Tensor:
    """One new token of every lane over its cached ones; returns [N, G, Q, K].

    Args:
        mask_NL: 0 where a lane holds a token, -inf beyond.
        positions_N: int64, of the new tokens.
    """
    scale = rule.scale_of(query_NGQK.shape[-1])
    scores_NGQL = (query_NGQK @ keys_NGLK.transpose(-1, -2)).float() * scale + mask_NL[:, None, None].float()
    if rule.window is not None:
        columns_L = torch.arange(keys_NGLK.shape[2], device=positions_N.device)
        gone_NL = columns_L <= (positions_N - rule.window)[:, None]
        scores_NGQL = scores_NGQL.masked_fill(gone_NL[:, None, None], float("-inf"))
    if rule.sinks_H is not None:
        sinks_1GQ1 = rule.sinks_H.float().view(1, *query_NGQK.shape[1:3], 1)
        scores_NGQL = torch.cat((scores_NGQL, sinks_1GQ1.expand(len(scores_NGQL), -1, -1, -1)), dim=-1)
    shares_NGQL = scores_NGQL.softmax(dim=-1)[..., : keys_NGLK.shape[2]]
    return shares_NGQL.to(values_NGLK.dtype) @ values_NGLK


def _first_is(x: Tensor) -> Tensor:
    """[..., 1] -> [..., _EXTRA]: zeros behind it."""
    return F.pad(x, (0, _EXTRA - 1))


def _visible(first: int, last: int, oldest: int, window: int | None, device: torch.device) -> Tensor:
    """bool [C, J]: which of the keys oldest..last-1 each of the queries first..last-1 sees."""
    query_C1 = torch.arange(first, last, device=device)[:, None]
    key_J = torch.arange(oldest, last, device=device)
    seen_CJ = key_J <= query_C1
    return seen_CJ if window is None else seen_CJ & (key_J > query_C1 - window)
