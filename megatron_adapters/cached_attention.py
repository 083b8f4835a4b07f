"""Attention through the cache: what the model's own attention calls when a pass is a prefill or a decode step.

Queries and keys arrive with their positions already rotated in, so that a cached key is used as it is.

Shapes: T rows of the pass (tokens of packed prompts, or one token a sequence), Q local query heads, H local KV heads,
G = Q / H, D head dim, N lanes of a group, L tokens in use, C tokens of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import PackedContext, packed_attention
from .kv_cache import Lane, LaneGroup
from .ruled_attention import PLAIN, Rule, ruled_decode

# Keys are read in whole steps: few distinct shapes, and masks aligned as CUDA kernels want them. On a CPU what is read
# is what it costs.
_LENGTH_STEP = {"cuda": 32, "cpu": 8}


def mark_filled(lanes: Sequence[Lane], length: int) -> None:
    """Let attention see the first `length` tokens of these lanes."""
    for lane in lanes:
        lane.group.mask_RC[lane.row, :length] = 0


class PrefillAttention:
    """Attention of packed prompts that also stores their keys and values, in every lane that continues a prompt."""

    def __init__(self, lanes: Sequence[Sequence[Lane]]) -> None:
        """`lanes[i]`: of the context's sequence i; those of padding, at the end, may be left out."""
        self._lanes = lanes

    def attend(
        self,
        layer_number: int,
        query_TQD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        context: PackedContext,
        *,
        rule: Rule = PLAIN,
    ) -> Tensor:
        """An `AttentionCache` of attention.py. Returns [T, Q, D]."""
        layer = layer_number - 1
        for (start, end), lanes in zip(pairwise(context.bounds), self._lanes, strict=False):
            for lane in lanes:
                lane.group.keys_RHCD[layer][lane.row, :, : end - start] = key_THD[start:end].transpose(0, 1)
                lane.group.values_RHCD[layer][lane.row, :, : end - start] = value_THD[start:end].transpose(0, 1)
        return packed_attention(query_TQD, key_THD, value_THD, context, rule)


@dataclass
class _GroupStep:
    """The rows of a decode step whose lanes are in one group, in the lanes' order."""

    group: LaneGroup
    batch_rows_N: Tensor
    """int64: which row of the pass each lane is."""
    lane_rows_N: Tensor
    """int64: 0 to N - 1, the live lanes."""
    positions_N: Tensor
    """int64: where the new token goes, which is how many are cached."""
    used: int
    """L: tokens to read."""
    is_batch: bool
    """The lanes are the rows of the pass, in their order."""
    mask_N11L: Tensor
    """0 where a lane holds a token, -inf beyond."""

    def attend(self, layer: int, query_NQD: Tensor, key_NHD: Tensor, value_NHD: Tensor, rule: Rule) -> Tensor:
        """Store the new keys and values of a layer (from 0), attend to all cached ones: [N, Q, D]."""
        num_lanes, num_heads, head_dim = query_NQD.shape
        keys_RHCD, values_RHCD = self.group.keys_RHCD[layer], self.group.values_RHCD[layer]
        keys_RHCD[self.lane_rows_N, :, self.positions_N] = key_NHD
        values_RHCD[self.lane_rows_N, :, self.positions_N] = value_NHD
        keys_NHLD, values_NHLD = (x[:num_lanes, :, : self.used] for x in (keys_RHCD, values_RHCD))
        query_NHGD = query_NQD.view(num_lanes, key_NHD.shape[1], -1, head_dim)
        if rule.is_plain:
            # CUDA's kernels want the mask as large as the scores.
            mask_N1GL = self.mask_N11L.expand(-1, -1, query_NHGD.shape[2], -1)
            out_NHGD = F.scaled_dot_product_attention(
                query_NHGD, keys_NHLD, values_NHLD, attn_mask=mask_N1GL, scale=rule.scale
            )
        else:
            mask_NL = self.mask_N11L[:, 0, 0]
            out_NHGD = ruled_decode(
                query_NHGD, keys_NHLD, values_NHLD, mask_NL=mask_NL, positions_N=self.positions_N, rule=rule
            )
        return out_NHGD.reshape(num_lanes, num_heads, -1)


class DecodeAttention:
    """Attention of one new token of every live lane, built anew when a sequence joins or leaves.

    `lanes[i]` belongs to row i of the pass; rows beyond (sequence-parallel padding) get zeros.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        self._steps: list[_GroupStep] = []
        for group in dict.fromkeys(lane.group for lane in lanes):
            rows = sorted((lane.row, row) for row, lane in enumerate(lanes) if lane.group is group)
            assert [lane_row for lane_row, _ in rows] == list(range(len(group.lanes))), "every live lane must step"
            device = group.shape.device
            batch_rows_N = torch.tensor([row for _, row in rows], device=device)
            lane_rows_N = torch.arange(len(rows), device=device)
            is_batch = [row for _, row in rows] == list(range(len(lanes)))
            self._steps.append(_GroupStep(group, batch_rows_N, lane_rows_N, batch_rows_N, 0, is_batch, group.mask_RC))

    def begin(self, positions: Sequence[int]) -> None:
        """Start a step: `positions[i]` is the position of row i's new token, from 0."""
        for step in self._steps:
            here = [positions[row] for row in step.batch_rows_N.tolist()]
            step.positions_N = torch.tensor(here, device=step.batch_rows_N.device)
            whole = _LENGTH_STEP[step.group.shape.device.type]
            step.used = min(step.group.lane_tokens, -(-(max(here) + 1) // whole) * whole)
            step.group.mask_RC[step.lane_rows_N, step.positions_N] = 0
            step.mask_N11L = step.group.mask_RC[: len(here), None, None, : step.used]

    def attend(
        self,
        layer_number: int,
        query_TQD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        context: PackedContext,
        *,
        rule: Rule = PLAIN,
    ) -> Tensor:
        """Store the new keys and values and attend to all cached ones; an `AttentionCache` of attention.py.

        Grouped queries ride as a query length of G, so that keys are never repeated.

        Args: layer_number: from 1. query_TQD, key_THD, value_THD: this rank's heads. context: not read.
        Returns: [T, Q, D], dtype of the query.
        """
        num_tokens, num_heads, _ = query_TQD.shape
        first = self._steps[0] if self._steps else None
        if first is not None and first.is_batch and num_tokens == len(self._lanes):
            return first.attend(layer_number - 1, query_TQD, key_THD, value_THD, rule)
        new = query_TQD.new_zeros if num_tokens > len(self._lanes) else query_TQD.new_empty
        out_TQD = new(num_tokens, num_heads, value_THD.shape[-1])
        for step in self._steps:
            # A view where rows and lanes are the same, else copies.
            rows = slice(len(self._lanes)) if step.is_batch else step.batch_rows_N
            out_TQD[rows] = step.attend(layer_number - 1, query_TQD[rows], key_THD[rows], value_THD[rows], rule)
        return out_TQD
