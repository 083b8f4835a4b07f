"""One training (or scoring) pass: micro-batches through the pipeline, the loss at its end, gradients on the way back.

Ranks that share experts step together: each runs as many micro-batches as the one with the most, of padding alone where
it has no data left. A loss that raises does not stop its rank, which others wait for; its micro-batch then has loss 0.

Shapes: T tokens of a micro-batch with padding, L a TP rank's share of them, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter
from .interface import Datum, Layout, LossFn
from .links import Links
from .lora_linear import Segment
from .model import Model
from .packing import pack, split_over_ranks
from .pipeline import schedule


def plan_micro_batches(lengths: Sequence[int], layout: Layout, dp_rank: int, token_budget: int) -> list[list[int]]:
    """Indices of the data in each micro-batch of this data-parallel rank; empty lists are padding. Pure.

    Every rank knows all lengths, so each also knows how many micro-batches the others run.
    """
    shares = split_over_ranks(lengths, layout.dp_size)
    if not layout.experts_span_copies:
        return pack(shares[dp_rank], lengths, token_budget)
    plans = [pack(share, lengths, token_budget) for share in shares]
    most = max(len(plan) for plan in plans)
    return plans[dp_rank] + [[] for _ in range(most - len(plans[dp_rank]))]


@dataclass
class _Running:
    """A micro-batch between its forward and its backward."""

    output: Tensor
    """the loss on the last stage, elsewhere the hidden states sent on"""
    arrived: Tensor | None


@dataclass
class TrainingPass:
    """The micro-batches of one pass on this rank; build it anew for each.

    Attributes:
        losses, logprobs: of each micro-batch, on the last stage; logprobs float32 [tokens] or [tokens, K] on the CPU.
        failure: the first exception of the loss function.
    """

    model: Model
    adapter: Adapter
    loss_fn: LossFn
    backward: bool
    losses: list[float] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    failure: Exception | None = None

    def run(self, batches: Sequence[Sequence[Datum]]) -> None:
        """Collectives: those of `Model.stage` and of the head, per micro-batch, forward and backward; between stages a
        message [L, 1, D] each way.
        """
        runtime = self.model.runtime
        links = Links(runtime)
        running: dict[int, _Running] = {}
        order = schedule(len(batches), runtime.place.pp_rank, runtime.layout.pp_size, backward=self.backward)
        for what, index in order:
            if what == "forward":
                one = self._forward(batches[index], links)
                if self.backward:
                    running[index] = one
            else:
                self._backward(running.pop(index), links)
        links.finish()

    def _forward(self, data: Sequence[Datum], links: Links) -> _Running:
        model, device = self.model, self.model.runtime.device
        lengths = [len(datum.tokens) for datum in data]
        num_tokens = sum(lengths)
        padding = model.padded_length(num_tokens) - num_tokens
        padded_lengths = [*lengths, padding] if padding else lengths  # the padding is a sequence of its own
        bounds = [0, *np.cumsum(padded_lengths).tolist()]
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in padded_lengths])
        tokens = np.concatenate([*(datum.tokens for datum in data), np.zeros(padding, np.int32)]).astype(np.int64)
        segments = [Segment(self.adapter.lora, 0, len(tokens))]
        arrived = links.receive_hidden(len(tokens) // model.runtime.layout.tp_size, model.arch.hidden_size)
        with torch.set_grad_enabled(self.backward):
            if arrived is not None and self.backward:
                arrived.requires_grad_()
            context = model.context(bounds, torch.from_numpy(positions).to(device))
            hidden_L1D = model.stage(
                torch.from_numpy(tokens).to(device), context, segments, arrived_L1D=arrived, table=[self.adapter.lora]
            )
            links.send_hidden(hidden_L1D)
            if model.own_head is None:
                return _Running(hidden_L1D, arrived)
            return _Running(self._loss(model.whole_sequence(hidden_L1D), data, segments), arrived)

    def _loss(self, hidden_TD: Tensor, data: Sequence[Datum], segments: Sequence[Segment]) -> Tensor:
        """The summed loss of one micro-batch, and its results kept."""
        assert self.model.own_head is not None
        device = hidden_TD.device
        lengths = [len(datum.tokens) for datum in data]
        num_tokens = sum(lengths)
        keys = data[0].inputs if data else {}
        inputs = {
            key: torch.from_numpy(np.concatenate([datum.inputs[key] for datum in data])).to(device) for key in keys
        }
        trailing = inputs["target_tokens"].shape[1:] if data else ()
        targets = torch.zeros(len(hidden_TD), *trailing, dtype=torch.int64, device=device)
        if data:
            targets[:num_tokens] = inputs["target_tokens"].long()
        padded = self.model.own_head.target_logprobs(hidden_TD, targets, segments)
        logprobs = padded[:num_tokens]
        loss = padded.sum() * 0.0  # joins every backward, whatever the loss function does
        if data and self.failure is None:
            segment_ids_T = torch.from_numpy(np.repeat(np.arange(len(data)), lengths)).to(device)
            try:
                given = self.loss_fn(logprobs, inputs, segment_ids_T)
                loss = given if given.requires_grad or not self.backward else loss + given
            except Exception as error:  # the caller raises it on every rank
                self.failure = error
        self.losses.append(loss.detach().item())
        self.logprobs.append(logprobs.detach().cpu())
        return loss

    def _backward(self, one: _Running, links: Links) -> None:
        gradient = None if self.model.own_head is not None else links.receive_gradient(one.output)
        if one.output.requires_grad:  # not in a first stage without adapted layers
            torch.autograd.backward(one.output, gradient)
        if one.arrived is not None:
            links.send_gradient(one.arrived)
