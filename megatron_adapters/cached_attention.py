"""Attention through the cache: what the model's own attention calls when a pass is a prefill or a decode step.

Queries and keys arrive with their positions already rotated in, so that a cached key is used as it is.

Shapes: T rows of the pass (tokens of packed prompts, or one token a sequence), Q local query heads, H local KV heads,
G = Q / H, D head dim, N lanes of a group, L tokens in use, C tokens of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        query_THGD: Tensor,
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
        return packed_attention(query_THGD.flatten(1, 2), key_THD, value_THD, context, rule)


class _GroupStep:
    """The rows of a decode step whose lanes are in one group, in the lanes' order.

    Attributes:
        batch_rows_N: int64, which row of the pass each lane is.
        is_batch: the lanes are the rows of the pass, in their order.
    """

    def __init__(self, group: LaneGroup, batch_rows: list[int], *, is_batch: bool) -> None:
        self.group, self.batch_rows, self.is_batch = group, batch_rows, is_batch
        device = group.shape.device
        self.batch_rows_N = torch.tensor(batch_rows, device=device)
        self._lane_rows_N = torch.arange(len(batch_rows), device=device)  # the live lanes

    def begin(self, positions: list[int]) -> None:
        """`positions`: where each lane's new token goes, which is how many are cached."""
        group, num_lanes = self.group, len(positions)
        whole = _LENGTH_STEP[group.shape.device.type]
        self._used = min(group.lane_tokens, -(-(max(positions) + 1) // whole) * whole)
        self._positions_N = torch.tensor(positions, device=self.batch_rows_N.device)
        group.mask_RC[self._lane_rows_N, self._positions_N] = 0
        self._mask_N11L = group.mask_RC[:num_lanes, None, None, : self._used]
        # Where the new tokens go, of a layer's [R, H, C, D] as rows of D: index_copy_ is half of what index_put_ costs.
        heads_H = torch.arange(group.shape.num_kv_heads, device=self.batch_rows_N.device)
        places_NH = (self._lane_rows_N[:, None] * len(heads_H) + heads_H) * group.lane_tokens
        self._places = (places_NH + self._positions_N[:, None]).flatten()

    def attend(self, layer: int, query_NHGD: Tensor, key_NHD: Tensor, value_NHD: Tensor, rule: Rule) -> Tensor:
        """Store the new keys and values of a layer (from 0), attend to all cached ones: [N, Q, D]."""
        for cached_RHCD, new_NHD in (
            (self.group.keys_RHCD[layer], key_NHD),
            (self.group.values_RHCD[layer], value_NHD),
        ):
            dim = new_NHD.shape[-1]
            cached_RHCD.view(-1, dim).index_copy_(0, self._places, new_NHD.reshape(-1, dim))
        keys_NHLD, values_NHLD = self.group.in_use(len(self.batch_rows), self._used)[layer]
        if rule.is_plain:
            # CUDA's kernels want the mask as large as the scores.
            mask_N1GL = self._mask_N11L.expand(-1, -1, query_NHGD.shape[2], -1)
            out_NHGD = F.scaled_dot_product_attention(
                query_NHGD, keys_NHLD, values_NHLD, attn_mask=mask_N1GL, scale=rule.scale
            )
        else:
            mask_NL, positions_N = self._mask_N11L[:, 0, 0], self._positions_N
            out_NHGD = ruled_decode(
                query_NHGD, keys_NHLD, values_NHLD, mask_NL=mask_NL, positions_N=positions_N, rule=rule
            )
        return out_NHGD.flatten(1, 2)


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
            batch_rows = [row for _, row in rows]
            self._steps.append(_GroupStep(group, batch_rows, is_batch=batch_rows == list(range(len(lanes)))))

    def begin(self, positions: Sequence[int]) -> None:
        """Start a step: `positions[i]` is the position of row i's new token, from 0."""
        for step in self._steps:
            step.begin([positions[row] for row in step.batch_rows])

    def attend(
        self,
        layer_number: int,
        query_THGD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        context: PackedContext,
        *,
        rule: Rule = PLAIN,
    ) -> Tensor:
        """Store the new keys and values and attend to all cached ones; an `AttentionCache` of attention.py.

        Grouped queries ride as a query length of G, so that keys are never repeated.

        Args: layer_number: from 1. query_THGD, key_THD, value_THD: this rank's heads. context: not read.
        Returns: [T, Q, D], dtype of the query.
        """
        num_tokens = query_THGD.shape[0]
        first = self._steps[0] if self._steps else None
        if first is not None and first.is_batch and num_tokens == len(self._lanes):
            return first.attend(layer_number - 1, query_THGD, key_THD, value_THD, rule)
        new = query_THGD.new_zeros if num_tokens > len(self._lanes) else query_THGD.new_empty
        out_TQD = new(num_tokens, query_THGD.shape[1] * query_THGD.shape[2], value_THD.shape[-1])
        for step in self._steps:
            # A view where rows and lanes are the same, else copies.
            rows = slice(len(self._lanes)) if step.is_batch else step.batch_rows_N
            out_TQD[rows] = step.attend(layer_number - 1, query_THGD[rows], key_THD[rows], value_THD[rows], rule)
        return out_TQD
