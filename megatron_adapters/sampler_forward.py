"""The decode loop's two passes over the real model: packed prompts, and one token of every live sequence.

Shapes: T tokens of a pass with sequence-parallel padding, B rows (prompts, or live sequences), D hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby, pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .adapters import LoraWeights
from .attention import PackedContext
from .cached_attention import DecodeAttention, PrefillAttention
from .inference_layers import Wanted
from .interface import Choices
from .lora_linear import Segment
from .model import Model, Table
from .prompt_scores import Prompt, score_prompts
from .routing_replay import gather_noted
from .token_forward import Decoded, Prefilled, PrefillRow


class ModelForward:
    """The `TokenForward` over this rank's shard. `snapshots` is read at every pass."""

    def __init__(self, model: Model, snapshots: Mapping[str, LoraWeights]) -> None:
        self._model = model
        self._snapshots = snapshots
        self._joint = model.runtime.layout.experts_span_copies

    @torch.no_grad()
    def prefill(self, rows: Sequence[PrefillRow]) -> Prefilled:
        """Collectives: those of `Model.hidden_states`, `LmHead.logits`, and `score_prompts`; before these, where
        experts are to be noted, of `gather_noted`.
        """
        table = self._announce({row.snapshot_id for row in rows})
        device = self._model.runtime.device
        lengths = [len(row.tokens) for row in rows]
        num_tokens = sum(lengths)
        padding = self._model.padded_length(num_tokens) - num_tokens
        bounds = np.cumsum([0, *lengths, *([padding] if padding else [])]).tolist()
        positions_T = np.concatenate([np.arange(length) for length in [*lengths, padding]])
        tokens_T = np.concatenate([*(row.tokens for row in rows), np.zeros(padding, dtype=np.int32)])
        context = self._model.context(
            bounds, torch.from_numpy(positions_T).to(device), PrefillAttention([row.lanes for row in rows])
        )
        snapshot_ids = [row.snapshot_id for row in rows]
        last_B = torch.tensor(bounds[1 : len(rows) + 1], device=device) - 1
        last = Wanted(last_B, self._segments(snapshot_ids, [1] * len(rows)))
        scored, noted = any(row.scored for row in rows), any(row.request.note_experts for row in rows)
        whole = scored or noted  # else the last layer leaves out most tokens
        hidden_TD, experts_TMK = self._hidden(
            torch.from_numpy(tokens_T.astype(np.int64)).to(device),
            context,
            self._segments(snapshot_ids, lengths, padding),
            table,
            None if whole else last,
            note_experts=noted,
        )
        logits_BV = self._model.head.logits(hidden_TD[last_B] if whole else hidden_TD, last.segments)
        experts: list[Choices | None] = [None] * len(rows)
        if experts_TMK is not None:
            for place, (row, (start, end)) in enumerate(zip(rows, pairwise(bounds), strict=False)):
                experts[place] = experts_TMK[start:end].copy() if row.request.note_experts else None
        if not scored:
            return Prefilled(logits_BV, [None] * len(rows), experts)
        prompts = [
            Prompt(row.request, hidden_TD[start:end], self._segments([row.snapshot_id], [1])[0].lora)
            if row.scored
            else None
            for row, (start, end) in zip(rows, pairwise(bounds), strict=False)
        ]
        return Prefilled(logits_BV, score_prompts(self._model.head, prompts), experts)

    @torch.no_grad()
    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        snapshot_ids: Sequence[str | None],
        attention: DecodeAttention,
        *,
        note_experts: bool = False,
    ) -> Decoded:
        """Collectives: those of `Model.hidden_states` and `LmHead.logits`; between these, with `note_experts`, of
        `gather_noted`.
        """
        table = self._announce(set(snapshot_ids))
        device = self._model.runtime.device
        num_rows = len(tokens)
        padding = self._model.padded_length(num_rows) - num_rows
        ones = [1] * num_rows
        context = self._model.context(
            range(num_rows + padding + 1), torch.tensor([*positions, *[0] * padding], device=device), attention
        )
        hidden_TD, experts_TMK = self._hidden(
            torch.tensor([*tokens, *[0] * padding], device=device),
            context,
            self._segments(snapshot_ids, ones, padding),
            table,
            note_experts=note_experts,
        )
        logits_BV = self._model.head.logits(hidden_TD[:num_rows], self._segments(snapshot_ids, ones))
        return Decoded(logits_BV, experts_TMK)

    def _hidden(
        self,
        tokens_T: Tensor,
        context: PackedContext,
        segments: Sequence[Segment],
        table: Table,
        wanted: Wanted | None = None,
        *,
        note_experts: bool,
    ) -> tuple[Tensor, Choices | None]:
        """`Model.hidden_states`, and the experts of all tokens [T, M, K] where they are to be noted."""
        model = self._model
        if not note_experts:
            return model.hidden_states(tokens_T, context, segments, table, wanted), None
        arch = model.arch
        assert arch.experts is not None, "a model without experts was asked which it chose"
        with model.routing.noting() as noted:
            hidden_TD = model.hidden_states(tokens_T, context, segments, table, wanted)
        layers = len(arch.expert_layers)
        found = gather_noted(noted, len(tokens_T), num_layers=layers, experts=arch.experts, runtime=model.runtime)
        return hidden_TD, found

    @torch.no_grad()
    def join_others(self) -> None:
        """While another rank that shares experts with this one still has a pass to do, take part with padding.

        Collectives: per pass of the busiest rank one all-reduce over the control group (as before every pass of our
            own), and `Model.hidden_states`.
        """
        model = self._model
        while table := self._announce(()):
            length = model.padded_length(0)
            zeros_T = torch.zeros(length, dtype=torch.int64, device=model.runtime.device)
            context = model.context([0, length], torch.arange(length, device=model.runtime.device))
            model.hidden_states(zeros_T, context, [Segment(table[0], 0, length)], table)

    def _announce(self, snapshot_ids: Collection[str | None]) -> Table:
        """Say which weights this rank's pass is about to use (None: the base alone); without any it has no pass.

        Returns: for Routing.use the weights that some rank is about to use, and no others: a step of one adapter alone
            then needs no numbers. Empty if no rank has a pass; None if this rank shares experts with no other copy.
        """
        if not self._joint:
            return None
        known = [None, *sorted(self._snapshots)]  # the same on every rank: all make and drop the same snapshots
        flags = torch.tensor([snapshot_id in snapshot_ids for snapshot_id in known], dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._model.runtime.control_group)
        return [self._weights(snapshot_id) for snapshot_id, live in zip(known, flags.tolist(), strict=True) if live]

    def _weights(self, snapshot_id: str | None) -> LoraWeights | None:
        return None if snapshot_id is None else self._snapshots[snapshot_id]

    def _segments(self, snapshot_ids: Sequence[str | None], lengths: Sequence[int], padding: int = 0) -> list[Segment]:
        """One segment for every run of equal weights; padding goes with the last: weights of its own, be it the base's,
        would make a step of one adapter a mixed one.
        """
        segments, start = [], 0
        for snapshot_id, members in groupby(zip(snapshot_ids, lengths, strict=True), key=lambda member: member[0]):
            end = start + sum(length for _, length in members)
            segments.append(Segment(self._weights(snapshot_id), start, end))
            start = end
        segments[-1] = segments[-1]._replace(end=start + padding)
        return segments
