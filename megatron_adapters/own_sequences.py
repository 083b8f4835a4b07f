"""The sequences that one rank samples: started where there is room, advanced together, ended one by one.

Prompts are computed packed, several at once; between two such passes all live sequences, whatever their adapter,
advance by one token. A sequence that ends leaves its lane to the next that waits, the samplers in turn. Sequences with
the same weights are neighbours in a batch, so that each adapter is applied once to one contiguous part. What happened
is told to decode.py as events.

Shapes: B sequences of a step (or of a prefill), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cached_attention import DecodeAttention, mark_filled
from .interface import Choices
from .kv_cache import KvCache, Lane
from .philox import uniform_numbers
from .sample_ranks import SampleRanks
from .sample_request import PromptScores, RoutedExperts, SampledSequence, SampleRequest, StopReason, TokenLogprobs
from .stopping import DecodeText, StopRule
from .token_forward import PrefillRow, TokenForward
from .token_sampler import NOT_FINITE, Draw, SamplingRows, top_logprobs
from .waiting_samples import Waiting, WaitingQueues


@dataclass(eq=False)
class _Live:
    """One sequence being sampled on this rank."""

    request_index: int
    request: SampleRequest
    sample_index: int
    stop: StopRule
    lane: Lane | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = field(default_factory=list)
    experts: list[Choices] = field(default_factory=list)
    """where they are to be noted: of the prompt [P, M, K], then of each sampled token that went on [M, K]"""

    @property
    def last_position(self) -> int:
        """Where the newest token stands."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def tokens_left(self) -> int:
        """It may still draw so many."""
        return self.stop.max_tokens - len(self.tokens)


@dataclass(frozen=True)
class Ended:
    request_index: int
    sample_index: int
    sequence: SampledSequence
    dp_rank: int


@dataclass(frozen=True)
class Scored:
    request_index: int
    scores: PromptScores


@dataclass(frozen=True)
class Failed:
    request_index: int
    message: str


Event = Ended | Scored | Failed


class OwnSequences:
    """What one rank has to sample.

    Attributes:
        waiting: what it has yet to start.
        max_live: most sequences advanced at once, beside what the cache has room for.
    """

    def __init__(
        self,
        forward: TokenForward,
        cache: KvCache,
        ranks: SampleRanks,
        *,
        vocab_size: int,
        decode_text: Callable[[], DecodeText],
        prefill_tokens: int,
    ) -> None:
        """See Decoder."""
        self._forward = forward
        self._cache = cache
        self._ranks = ranks
        self._vocab_size = vocab_size
        self._decode_text = decode_text
        self._prefill_tokens = prefill_tokens
        self.max_live: int | None = None
        self.waiting = WaitingQueues()
        self._live: list[_Live] = []
        self._attention: DecodeAttention | None = None  # None: the members changed since it was built
        self._events: list[Event] = []

    def take_events(self) -> list[Event]:
        """What happened since they were taken last."""
        events, self._events = self._events, []
        return events

    def drop(self, request_index: int | None, *, tainted: bool) -> None:
        """Without an event: end all sequences of a request (None: of every request), started or not.

        tainted: their keys or values may hold NaN or infinity.
        """
        self.waiting.drop(request_index)
        for sequence in [x for x in self._live if request_index in (None, x.request_index)]:
            self._leave(sequence, tainted=tainted)

    def start_waiting(self) -> None:
        """Start what fits into one pass, of the samplers' queues in turn.

        One pass and no more, however much waits: those under way go on, and others are heard, in between.

        Where the first of the queue whose turn it is does not fit, it keeps its turn, and others go ahead of it with
        what has no more tokens to draw than some live sequence: so the last of these ends no later than if nobody had
        gone ahead, and with it whatever was in the way.
        """
        started: list[tuple[PrefillRow, list[_Live], Waiting]] = []
        num_tokens = num_rows = place = 0
        while place < len(self.waiting) and num_rows < self._cache.max_rows:
            waiting = self.waiting[place]
            request = waiting.request
            if started and num_tokens + len(request.prompt) > self._prefill_tokens:
                break
            sequences = []
            if place == 0 or waiting.max_tokens <= max(sequence.tokens_left for sequence in self._live):
                sequences = self._take_lanes(waiting, self._cache.max_rows - num_rows)
            if not sequences:
                place += 1
                continue
            lanes = [sequence.lane for sequence in sequences if sequence.lane is not None]
            started.append((PrefillRow(request, lanes, waiting.scored), sequences, waiting))
            num_tokens += len(request.prompt)
            num_rows += len(sequences)
            self.waiting.had_turn(place)
        if started:
            self._prefill(sorted(started, key=lambda one: _weights_order(one[0].snapshot_id)))

    def _take_lanes(self, waiting: Waiting, most: int) -> list[_Live]:
        """As many of the request's samples as there is room for now.

        most: how many at most, with or without a lane: each is a row of logits as wide as the vocabulary.
        """
        request = waiting.request
        decode_text = self._decode_text() if request.stop_strings else None
        stop = StopRule(request.stop_token_ids, request.stop_strings, waiting.max_tokens, decode_text)
        sequences = []
        while waiting.samples and len(sequences) < most and (self.max_live is None or len(self._live) < self.max_live):
            lane = None
            if waiting.lane_tokens and (lane := self._cache.reserve(waiting.lane_tokens)) is None:
                break
            sequence = _Live(waiting.request_index, request, waiting.samples.popleft(), stop, lane)
            sequences.append(sequence)
            self._live.append(sequence)  # at once: the next lane may find no memory, and this one must not stay taken
        return sequences

    def _prefill(self, started: list[tuple[PrefillRow, list[_Live], Waiting]]) -> None:
        """Compute prompts and draw the first token of each of their samples."""
        self._attention = None
        sequences = [sequence for _, started_here, _ in started for sequence in started_here]
        draw = self._prepare_draw(sequences)
        logits_rows = [place for place, (_, started_here, _) in enumerate(started) for _ in started_here]
        logits_rows_B = torch.tensor(logits_rows, device=self._cache.shape.device)
        output = self._forward.prefill([row for row, _, _ in started])
        for place, (row, started_here, waiting) in enumerate(started):
            mark_filled(row.lanes, len(row.tokens))
            scores = output.scores[place]
            if waiting.scored and scores is not None:
                self._events.append(Scored(waiting.request_index, scores))
                waiting.scored = False  # once is enough, should its other samples start later
            if (experts := output.experts[place]) is not None:
                for sequence in started_here:
                    sequence.experts.append(experts)
        self._draw(output.logits_BV[logits_rows_B], sequences, draw)

    def step(self) -> None:
        """One more token for every live sequence."""
        if not self._live:
            return
        if self._attention is None:
            self._live.sort(key=_batch_order)
            self._attention = DecodeAttention([sequence.lane for sequence in self._live if sequence.lane is not None])
        live = list(self._live)
        positions = [sequence.last_position for sequence in live]
        self._attention.begin(positions)
        draw = self._prepare_draw(live)
        decoded = self._forward.decode(
            [sequence.tokens[-1] for sequence in live],
            positions,
            [sequence.request.snapshot_id for sequence in live],
            self._attention,
            note_experts=any(sequence.request.note_experts for sequence in live),
        )
        if decoded.experts_BMK is not None:
            for sequence, experts_MK in zip(live, decoded.experts_BMK, strict=False):
                if sequence.request.note_experts:
                    sequence.experts.append(experts_MK.copy())  # a view would keep those of the whole batch
        self._draw(decoded.logits_BV, live, draw)

    def _prepare_draw(self, sequences: list[_Live]) -> Draw | None:
        """The next draw of these sequences; None on a rank that does not draw."""
        if self._ranks.tp_rank != 0:
            return None
        requests = [sequence.request for sequence in sequences]
        rows = SamplingRows(
            [request.temperature for request in requests],
            [request.top_k for request in requests],
            [request.top_p for request in requests],
            uniform_numbers(
                [request.seed for request in requests],
                [sequence.sample_index for sequence in sequences],
                [len(sequence.tokens) for sequence in sequences],
            ),
        )
        return Draw(rows, self._vocab_size, self._cache.shape.device)

    def _draw(self, logits_BV: Tensor, sequences: list[_Live], draw: Draw | None) -> None:
        """Draw and append one token for each sequence; those that end with it leave."""
        device = logits_BV.device
        if draw is not None:
            tokens_B, logprobs_B = draw(logits_BV)
        else:
            tokens_B = torch.empty(len(sequences), dtype=torch.int64, device=device)
            logprobs_B = torch.empty(len(sequences), dtype=torch.float32, device=device)
        tokens, logprobs = self._ranks.agree(tokens_B, logprobs_B)
        self._note_topk(logits_BV, sequences)
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            self._append(sequence, token, logprob)

    @staticmethod
    def _note_topk(logits_BV: Tensor, sequences: list[_Live]) -> None:
        """The candidates of this step, for the sequences that want them."""
        asking = [place for place, sequence in enumerate(sequences) if sequence.request.topk_sample_logprobs]
        if not asking:
            return
        top = top_logprobs(
            logits_BV[torch.tensor(asking, device=logits_BV.device)],
            [sequences[place].request.temperature for place in asking],
            max(sequences[place].request.topk_sample_logprobs for place in asking),
        )
        for row, place in enumerate(asking):
            width = sequences[place].request.topk_sample_logprobs
            sequences[place].topk.append((top.token_ids[row, :width], top.logprobs[row, :width]))

    def _append(self, sequence: _Live, token: int, logprob: float) -> None:
        if token == NOT_FINITE:
            weights = sequence.request.snapshot_id or "the base model"
            message = (
                f"the logits of {weights} are not finite after {len(sequence.tokens)} sampled tokens: the weights have "
                "diverged. Go back to an earlier checkpoint and lower the learning rate"
            )
            self._events.append(Failed(sequence.request_index, message))
            self._leave(sequence, tainted=True)
            return
        if sequence.stop.max_tokens > 0:
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
        if reason := sequence.stop.reason(sequence.tokens):
            self._events.append(_ended(sequence, reason, self._ranks.dp_rank))
            self._leave(sequence)

    def _leave(self, sequence: _Live, *, tainted: bool = False) -> None:
        self._live.remove(sequence)
        if sequence.lane is not None:
            self._cache.release(sequence.lane, tainted=tainted)
        self._attention = None


def _weights_order(snapshot_id: str | None) -> tuple[bool, str]:
    """The base model first, then by name."""
    return snapshot_id is not None, snapshot_id or ""


def _batch_order(sequence: _Live) -> tuple[bool, str, int]:
    """By weights, so that each adapter is applied once; then as the lanes lie, so that attention copies nothing."""
    return *_weights_order(sequence.request.snapshot_id), sequence.lane.row if sequence.lane else 0


def _ended(sequence: _Live, reason: StopReason, dp_rank: int) -> Ended:
    topk = None
    if sequence.request.topk_sample_logprobs and sequence.tokens:
        topk = TokenLogprobs(*(np.stack(column) for column in zip(*sequence.topk, strict=True)))
    experts = None
    if sequence.experts:
        prompt, *steps = sequence.experts
        experts = RoutedExperts(prompt, np.stack(steps) if steps else prompt[:0])
    sampled = SampledSequence(
        np.asarray(sequence.tokens, dtype=np.int32),
        np.asarray(sequence.logprobs, dtype=np.float32),
        reason,
        topk,
        experts,
    )
    return Ended(sequence.request_index, sequence.sample_index, sampled, dp_rank)
