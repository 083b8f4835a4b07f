"""Training (or scoring) passes: micro-batches through the pipeline, losses at its end, gradients on the way back.

Ranks that share experts step together: each runs as many micro-batches as the one with the most, of padding alone where
it has no data left. The activations of a datum longer than a micro-batch should be would not fit: they are computed
again in the backward (recompute.py). A loss that raises does not stop its rank, which others wait for; its micro-batch
then has loss 0.

Shapes: T tokens of a micro-batch with padding, L a TP rank's share of them, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import LoraWeights
from .interface import Layout, Pass
from .links import Links
from .mixed_batch import Item, MicroBatch, Results
from .model import Model
from .packing import pack, split_over_ranks
from .pipeline import schedule
from .row_products import FEWEST_ROWS


class MicroBatchPlan(NamedTuple):
    """What one rank does in one micro-batch."""

    members: list[int]
    """indices of its data; none is padding alone"""
    is_long: bool
    """a datum in it is longer than a micro-batch should be, here or on a rank that shares experts with this one"""


def plan_micro_batches(lengths: Sequence[int], layout: Layout, dp_rank: int, token_budget: int) -> list[MicroBatchPlan]:
    """The micro-batches of this data-parallel rank. Pure.

    Every rank knows all lengths, so each also knows how many micro-batches the others run, and which are long.
    """
    shares = split_over_ranks(lengths, layout.dp_size)
    together = shares if layout.experts_span_copies else [shares[dp_rank]]
    plans = [pack(share, lengths, token_budget) for share in together]
    most = max(len(plan) for plan in plans)
    plans = [plan + [[] for _ in range(most - len(plan))] for plan in plans]
    longest = [max(sum(lengths[i] for i in plan[index]) for plan in plans) for index in range(most)]
    own = plans[dp_rank] if layout.experts_span_copies else plans[0]
    return [MicroBatchPlan(members, num > token_budget) for members, num in zip(own, longest, strict=True)]


@dataclass
class _Running:
    """A micro-batch between its forward and its backward."""

    output: Tensor
    """the loss on the last stage, elsewhere the hidden states sent on"""
    arrived: Tensor | None


@dataclass
class TrainingPass:
    """The micro-batches of one group of passes on this rank; build it anew for each.

    Attributes: loras: of every adapter in the group, by id. results: filled in on the last stage.
    """

    model: Model
    passes: Sequence[Pass]
    loras: Mapping[str, LoraWeights]
    results: Results
    backward: bool

    def run(self, batches: Sequence[tuple[Sequence[Item], bool]]) -> None:
        """Forward, and backward, of micro-batches: their data, and whether to compute their activations again.

        Collectives: those of `Model.stage` and of the head, per micro-batch, forward and backward; between stages a
        message [L, 1, D] each way.
        """
        runtime = self.model.runtime
        links = Links(runtime)
        running: dict[int, _Running] = {}
        order = schedule(len(batches), runtime.place.pp_rank, runtime.layout.pp_size, backward=self.backward)
        for what, index in order:
            self.model.gets_on(sum(len(item.datum.tokens) for item in batches[index][0]))
            if what == "forward":
                one = self._forward(*batches[index], links)
                if self.backward:
                    running[index] = one
            else:
                self._backward(running.pop(index), links)
        links.finish()

    def _forward(self, items: Sequence[Item], is_long: bool, links: Links) -> _Running:
        model, device = self.model, self.model.runtime.device
        num_tokens = sum(len(item.datum.tokens) for item in items)
        fewest = FEWEST_ROWS * model.runtime.layout.tp_size  # on each rank
        batch = MicroBatch(self.passes, items, model.padded_length(max(num_tokens, fewest)))
        segments = batch.segments(self.loras)
        arrived = links.receive_hidden(len(batch.tokens) // model.runtime.layout.tp_size, model.arch.hidden_size)
        with torch.set_grad_enabled(self.backward):
            if arrived is not None and self.backward:
                arrived.requires_grad_()
            context = model.context(batch.bounds, torch.from_numpy(batch.positions).to(device))
            tokens_T = torch.from_numpy(batch.tokens).to(device)
            # Every adapter of the group, since other ranks' tokens may come to this one's experts with any of them.
            table = list(self.loras.values())
            hidden_L1D = model.stage(
                tokens_T,
                context,
                segments,
                arrived_L1D=arrived,
                table=table,
                recompute=is_long,
                given=batch.given(device),
            )
            links.send_hidden(hidden_L1D)
            if model.own_head is None:
                return _Running(hidden_L1D, arrived)
            hidden_TD = model.whole_sequence(hidden_L1D)
            return _Running(batch.loss(model.own_head, hidden_TD, segments, self.results), arrived)

    def _backward(self, one: _Running, links: Links) -> None:
        gradient = None if self.model.own_head is not None else links.receive_gradient(one.output)
        if one.output.requires_grad:  # not in a first stage without adapted layers
            torch.autograd.backward(one.output, gradient)
        if one.arrived is not None:
            links.send_gradient(one.arrived)
