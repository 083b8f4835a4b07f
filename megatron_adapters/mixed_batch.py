"""Passes of several adapters as one batch: which token belongs to whom, and each pass's own loss.

Data of a micro-batch lie adapter by adapter, so that every adapter's tokens are one segment (lora_linear.py), and pass
by pass within it. Tokens of different sequences meet nowhere in the model, so a pass's loss reaches its own adapter
only, and an adapter's numbers do not depend on what the others' tokens, weights or losses are.

Shapes: T tokens of a micro-batch (padding at the end), D hidden, K targets of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from .adapters import LoraWeights
from .head import LmHead
from .interface import Datum, Pass, PassOutput
from .lora_linear import Segment
from .routing_replay import Given


@dataclass(frozen=True)
class Item:
    """One datum of the group: `passes[pass_index].data[datum_index]`."""

    pass_index: int
    datum_index: int
    datum: Datum


def arrange(passes: Sequence[Pass]) -> list[Item]:
    """All data, those of one adapter side by side in the order the adapters first appear. Pure."""
    first = {one.adapter_id: index for index, one in reversed(list(enumerate(passes)))}
    order = sorted(range(len(passes)), key=lambda index: (first[passes[index].adapter_id], index))
    return [Item(index, place, datum) for index in order for place, datum in enumerate(passes[index].data)]


@dataclass(frozen=True)
class _Part:
    """Tokens start..end-1 of a micro-batch: consecutive data of one pass."""

    pass_index: int
    items: tuple[Item, ...]
    start: int
    end: int

    @property
    def trailing(self) -> tuple[int, ...]:
        """Of target_tokens, beyond the tokens: () or (K,)."""
        return self.items[0].datum.inputs["target_tokens"].shape[1:]


@dataclass
class Results:
    """What a group of passes gives, on one rank: of the data that this rank had; zeros and Nones elsewhere."""

    loss_sums: np.ndarray
    """float64 [passes]"""
    logprobs: list[list[np.ndarray]]
    """by pass and datum: float32 [N] or [N, K]"""
    failures: dict[int, Exception] = field(default_factory=dict)
    """by pass: the first exception of its loss"""

    @classmethod
    def empty(cls, passes: Sequence[Pass]) -> Results:
        """Zeros everywhere."""
        pieces = [[np.zeros(d.inputs["target_tokens"].shape, np.float32) for d in one.data] for one in passes]
        return cls(np.zeros(len(passes)), pieces)

    def output(self, pass_index: int) -> PassOutput:
        """The results of one pass."""
        total = float(self.loss_sums[pass_index])
        return PassOutput(self.logprobs[pass_index], total, {"loss:sum": total})


class MicroBatch:
    """Some of a group's data, packed. Attributes: num_tokens without, bounds and positions and tokens with padding."""

    def __init__(self, passes: Sequence[Pass], items: Sequence[Item], padded_length: int) -> None:
        """items: ascending as `arrange` gave them. padded_length: of the forward, at least their tokens."""
        self._passes = passes
        self.items = tuple(items)
        lengths = [len(item.datum.tokens) for item in items]
        self.num_tokens = sum(lengths)
        padding = padded_length - self.num_tokens
        padded = [*lengths, padding] if padding else lengths  # the padding is a sequence of its own
        self.bounds = [0, *np.cumsum(padded).tolist()]
        self.positions = np.concatenate([np.arange(n, dtype=np.int64) for n in padded])
        tokens = [*(item.datum.tokens for item in items), np.zeros(padding, np.int32)]
        self.tokens = np.concatenate(tokens).astype(np.int64)
        self.parts: list[_Part] = []
        start = 0
        for pass_index, of_pass in groupby(items, key=lambda item: item.pass_index):
            members = tuple(of_pass)
            end = start + sum(len(item.datum.tokens) for item in members)
            self.parts.append(_Part(pass_index, members, start, end))
            start = end

    def given(self, device: torch.device) -> Given | None:
        """The experts that its data bring along; None where none does."""
        having = [item.datum.experts for item in self.items if item.datum.experts is not None]
        if not having:
            return None
        experts_TMK = np.zeros((len(self.tokens), *having[0].shape[1:]), having[0].dtype)
        replayed_T = np.zeros(len(self.tokens), bool)
        for item, start in zip(self.items, self.bounds, strict=False):
            if item.datum.experts is not None:
                end = start + len(item.datum.tokens)
                experts_TMK[start:end], replayed_T[start:end] = item.datum.experts, True
        return Given(torch.from_numpy(experts_TMK).to(device), torch.from_numpy(replayed_T).to(device))

    def segments(self, adapters: Mapping[str, LoraWeights]) -> list[Segment]:
        """One for each adapter in it; the padding goes with the last."""
        found: list[Segment] = []
        for part in self.parts:
            lora = adapters[self._passes[part.pass_index].adapter_id]
            if found and found[-1].lora is lora:
                found[-1] = Segment(lora, found[-1].start, part.end)
            else:
                found.append(Segment(lora, part.start, part.end))
        if not found:  # padding alone
            return [Segment(next(iter(adapters.values())), 0, len(self.tokens))]
        found[-1] = found[-1]._replace(end=len(self.tokens))
        return found

    def loss(self, head: LmHead, hidden_TD: Tensor, segments: Sequence[Segment], results: Results) -> Tensor:
        """The sum of the passes' losses, to be differentiated; logprobs and losses go into `results`.

        A loss that raises counts as zero here and is noted; the other passes' numbers stay what they are.
        The loss joins the backward whatever the passes do: ranks that share this one's experts wait for its part.
        Collectives: those of LmHead.target_logprobs, once for each run of passes with equal K.
        """
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        runs = [list(run) for _, run in groupby(self.parts, key=lambda part: part.trailing)]
        for number, run in enumerate(runs):
            start, end = run[0].start, run[-1].end
            if number == len(runs) - 1:
                end = len(self.tokens)  # the padding
            inputs = [_inputs(part, hidden_TD.device) for part in run]
            targets = torch.cat([values["target_tokens"].long() for values in inputs])
            targets = torch.cat((targets, targets.new_zeros(end - start - len(targets), *targets.shape[1:])))
            own = _clip(segments, start, end)
            hidden = hidden_TD if (start, end) == (0, len(hidden_TD)) else hidden_TD[start:end]
            logprobs = head.target_logprobs(hidden, targets, own)
            for part, values in zip(run, inputs, strict=True):
                mine = logprobs[part.start - start : part.end - start]
                total = total + self._part_loss(part, mine, values, results)
        return total if total.requires_grad else hidden_TD.sum() * 0.0

    def _part_loss(self, part: _Part, logprobs: Tensor, inputs: Mapping[str, Tensor], results: Results) -> Tensor:
        lengths = [len(item.datum.tokens) for item in part.items]
        pieces = logprobs.detach().cpu().split(lengths)
        for item, piece in zip(part.items, pieces, strict=True):
            results.logprobs[part.pass_index][item.datum_index] = piece.numpy()
        nothing = logprobs.new_zeros(())
        if part.pass_index in results.failures:
            return nothing
        segment_ids = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(logprobs.device)
        try:
            loss = self._passes[part.pass_index].loss_fn(logprobs, inputs, segment_ids)
            results.loss_sums[part.pass_index] += loss.detach().item()
        except Exception as error:  # this pass's own failure; the caller reports it on every rank
            results.failures[part.pass_index] = error
            return nothing
        return loss


def _inputs(part: _Part, device: torch.device) -> dict[str, Tensor]:
    """Loss inputs of a part's data, one after the other."""
    return {
        key: torch.from_numpy(np.concatenate([item.datum.inputs[key] for item in part.items])).to(device)
        for key in part.items[0].datum.inputs
    }


def _clip(segments: Sequence[Segment], start: int, end: int) -> list[Segment]:
    parts = [Segment(s.lora, max(s.start, start) - start, min(s.end, end) - start) for s in segments]
    return [part for part in parts if part.end > part.start]
