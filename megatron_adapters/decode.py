"""Step 6 of a request, sampling. Before: worker/sample_step.py. After: worker publishes each result as it finishes.

Continuous batching: prompts are computed packed, several at once; then all live sequences, whatever their adapter,
advance together by one token a step. A sequence that ends leaves its lane to the next that waits, in order of arrival;
new requests join between steps. Sequences with the same weights are neighbours in a batch, so that each adapter is
applied once to one contiguous part.

Shapes: B sequences of a step (or of a prefill), V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cached_attention import DecodeAttention, mark_filled
from .kv_cache import KvCache, Lane
from .philox import uniform_numbers
from .sample_ranks import SampleRanks, Shares
from .sample_request import (
    PromptScores,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
    TokenLogprobs,
    most_tokens,
    refusal,
)
from .stopping import DecodeText, StopRule
from .token_forward import PrefillRow, TokenForward
from .token_sampler import NOT_FINITE, SamplingRows, sample_tokens, top_logprobs

OnFinished = Callable[[int, SampleResult], None]
Admit = Callable[[], Sequence[SampleRequest]]


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

    @property
    def last_position(self) -> int:
        """Where the newest token stands."""
        return len(self.request.prompt) + len(self.tokens) - 1


@dataclass
class _Waiting:
    """Samples of one request that this rank has yet to start."""

    request_index: int
    request: SampleRequest
    samples: deque[int]
    max_tokens: int
    scored: bool
    """Still to answer what is asked about the prompt."""

    @property
    def lane_tokens(self) -> int:
        """The newest token is never cached, so a single one needs no lane at all."""
        return len(self.request.prompt) + self.max_tokens - 1 if self.max_tokens > 1 else 0


@dataclass(frozen=True)
class _Ended:
    request_index: int
    sample_index: int
    sequence: SampledSequence
    dp_rank: int


@dataclass(frozen=True)
class _Scored:
    request_index: int
    scores: PromptScores


@dataclass(frozen=True)
class _Failed:
    request_index: int
    message: str


@dataclass
class _Open:
    """A request not yet answered, on every rank."""

    num_samples: int
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    scores: PromptScores | None = None
    parts: list[tuple[int, range]] = field(default_factory=list)


class Decoder:
    """The loop; its state lives for one `run`, the cache for longer."""

    def __init__(
        self,
        forward: TokenForward,
        cache: KvCache,
        ranks: SampleRanks,
        *,
        vocab_size: int,
        known_snapshots: Callable[[], Iterable[str]],
        decode_text: Callable[[], DecodeText],
        prefill_tokens: int = 4096,
    ) -> None:
        """`decode_text` gives the tokenizer's decoding, asked for with the first stop string.

        `prefill_tokens`: prompt tokens computed in one pass (a longer prompt goes alone): bounds its memory.
        """
        self._forward = forward
        self._cache = cache
        self._ranks = ranks
        self._vocab_size = vocab_size
        self._known_snapshots = known_snapshots
        self._decode_text = decode_text
        self._prefill_tokens = prefill_tokens
        self._max_live: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._live: list[_Live] = []
        self._attention: DecodeAttention | None = None  # None: the members changed since it was built
        self._events: list[_Ended | _Scored | _Failed] = []
        self._open: dict[int, _Open] = {}
        self._cancelled: dict[int, str] = {}
        self._results: list[SampleResult | None] = []
        self._shares = Shares(self._ranks.dp_size)

    def run(
        self,
        requests: Sequence[SampleRequest],
        on_finished: OnFinished | None = None,
        admit: Admit | None = None,
        *,
        max_live: int | None = None,
    ) -> list[SampleResult]:
        """Answer all requests, and those that `admit` brings in between steps.

        Args:
            on_finished: called on every rank as each request is answered, with its place in the order of arrival.
            admit: called before every step, the same number of times on every rank; must return the same requests on
                every rank. The run ends when nothing is left, so what arrives later is for the next run.
            max_live: most sequences that this rank advances at once, beside what the cache has room for.
        Returns: one result per request in order of arrival, on every rank. A request that cannot be served has
            `error` set and disturbs no other.
        Collectives: those of the model's passes and of `SampleRanks`.
        """
        self._max_live = max_live
        try:
            self._accept(requests, on_finished)
            while True:
                if admit is not None:
                    self._accept(admit(), on_finished)
                    self._give_up_cancelled(on_finished)
                if not self._open:
                    break
                self._start_waiting()
                self._step()
                self._forward.join_others()
                self._settle(on_finished)
            return [result for result in self._results if result is not None]
        finally:
            for sequence in list(self._live):  # only after an exception: the lanes must not stay taken
                self._leave(sequence, tainted=True)
            self._reset()

    def cancel(self, index: int, reason: str) -> None:
        """From `admit`, on every rank: the request with this place in the order of arrival is not wanted any more."""
        self._cancelled[index] = reason

    def release_memory(self) -> None:
        """Free the cache between runs: a training pass wants the memory. The next run takes it again.

        Nothing happens while sequences are live: the worker lets training cut in between two steps, from `admit`.
        """
        if self._cache.num_live() == 0:
            self._cache.drop_unused()

    # Requests in, results out: the same on every rank.

    def _accept(self, requests: Sequence[SampleRequest], on_finished: OnFinished | None) -> None:
        first = len(self._results)
        good = []
        for index, request in enumerate(requests, start=first):
            self._results.append(None)
            if message := self._refusal(request):
                self._answer(index, SampleResult(error=message), on_finished)
            else:
                good.append((index, request))
        shares = self._shares.deal([request.num_samples for _, request in good])
        for (index, request), parts in zip(good, shares, strict=True):
            self._open[index] = _Open(request.num_samples, parts=parts)
            max_tokens = self._max_tokens(request)
            for part, (dp_rank, samples) in enumerate(parts):
                if dp_rank == self._ranks.dp_rank:
                    scored = request.scores_prompt and part == 0
                    self._waiting.append(_Waiting(index, request, deque(samples), max_tokens, scored))

    def _max_tokens(self, request: SampleRequest) -> int:
        # With no wish of its own, a request takes what the cache can hold.
        limit = self._cache.longest() if request.max_tokens is None else self._cache.max_context
        return most_tokens(request, limit)

    def _refusal(self, request: SampleRequest) -> str | None:
        if message := refusal(request, vocab_size=self._vocab_size, max_context=self._cache.max_context):
            return message
        if request.snapshot_id is not None and request.snapshot_id not in self._known_snapshots():
            return f"sampler weights {request.snapshot_id!r} are not loaded on this worker"
        max_tokens = self._max_tokens(request)
        needed = len(request.prompt) + max_tokens - 1
        if max_tokens > 1 and needed > self._cache.longest():
            return (
                f"prompt of {len(request.prompt)} tokens and max_tokens {request.max_tokens} need {needed} cached "
                f"tokens; this worker's memory holds {self._cache.longest()}: shorten the prompt or lower max_tokens"
            )
        if request.stop_strings:
            try:
                self._decode_text()
            except (OSError, ValueError) as error:
                return (
                    f"stop strings need the model's tokenizer, which did not load: {error}. Stop on token ids instead"
                )
        return None

    def _answer(self, index: int, result: SampleResult, on_finished: OnFinished | None) -> None:
        self._results[index] = result
        if on_finished is not None:
            on_finished(index, result)

    def _settle(self, on_finished: OnFinished | None) -> None:
        events, self._events = self._events, []
        for event in self._ranks.exchange(events):
            entry = self._open.get(event.request_index)
            if entry is None:  # another sample of the request failed before
                continue
            if isinstance(event, _Failed):
                self._abandon(event.request_index, entry, tainted=True)
                self._answer(event.request_index, SampleResult(error=event.message), on_finished)
            elif isinstance(event, _Scored):
                entry.scores = event.scores
            else:
                entry.sequences[event.sample_index] = event.sequence
                self._shares.done(event.dp_rank, 1)
                if len(entry.sequences) == entry.num_samples:
                    del self._open[event.request_index]
                    sequences = [entry.sequences[sample] for sample in range(entry.num_samples)]
                    self._answer(event.request_index, SampleResult(sequences, entry.scores), on_finished)

    def _give_up_cancelled(self, on_finished: OnFinished | None) -> None:
        for index, reason in self._cancelled.items():
            if index in self._open:
                self._abandon(index, self._open[index], tainted=False)
                self._answer(index, SampleResult(error=reason), on_finished)
        self._cancelled.clear()

    def _abandon(self, index: int, entry: _Open, *, tainted: bool) -> None:
        for dp_rank, samples in entry.parts:
            self._shares.done(dp_rank, sum(sample not in entry.sequences for sample in samples))
        del self._open[index]
        self._waiting = deque(waiting for waiting in self._waiting if waiting.request_index != index)
        for sequence in [sequence for sequence in self._live if sequence.request_index == index]:
            self._leave(sequence, tainted=tainted)

    # This rank's own sequences.

    def _start_waiting(self) -> None:
        """Start what fits, in order of arrival; the first that does not fit holds back those behind it."""
        while self._waiting:
            started: list[tuple[PrefillRow, list[_Live], _Waiting]] = []
            num_tokens = 0
            while self._waiting and (
                not started or num_tokens + len(self._waiting[0].request.prompt) <= self._prefill_tokens
            ):
                waiting = self._waiting[0]
                sequences = self._take_lanes(waiting)
                if not sequences:
                    break
                lanes = [sequence.lane for sequence in sequences if sequence.lane is not None]
                request = waiting.request
                started.append((PrefillRow(request, lanes, waiting.scored), sequences, waiting))
                num_tokens += len(request.prompt)
                if waiting.samples:
                    break
                self._waiting.popleft()
            if not started:
                return
            self._prefill(sorted(started, key=lambda one: _weights_order(one[0].snapshot_id)))

    def _take_lanes(self, waiting: _Waiting) -> list[_Live]:
        """As many of the request's samples as there is room for now."""
        request = waiting.request
        decode_text = self._decode_text() if request.stop_strings else None
        stop = StopRule(request.stop_token_ids, request.stop_strings, waiting.max_tokens, decode_text)
        sequences = []
        while waiting.samples and (self._max_live is None or len(self._live) < self._max_live):
            lane = None
            if waiting.lane_tokens and (lane := self._cache.reserve(waiting.lane_tokens)) is None:
                break
            sequence = _Live(waiting.request_index, request, waiting.samples.popleft(), stop, lane)
            sequences.append(sequence)
            self._live.append(sequence)  # at once: the next lane may find no memory, and this one must not stay taken
        return sequences

    def _prefill(self, started: list[tuple[PrefillRow, list[_Live], _Waiting]]) -> None:
        """Compute prompts and draw the first token of each of their samples."""
        self._attention = None
        output = self._forward.prefill([row for row, _, _ in started])
        sequences, logits_rows = [], []
        for place, (row, started_here, waiting) in enumerate(started):
            mark_filled(row.lanes, len(row.tokens))
            scores = output.scores[place]
            if waiting.scored and scores is not None:
                self._events.append(_Scored(waiting.request_index, scores))
                waiting.scored = False  # once is enough, should its other samples start later
            sequences += started_here
            logits_rows += [place] * len(started_here)
        self._draw(output.logits_BV[torch.tensor(logits_rows, device=output.logits_BV.device)], sequences)

    def _step(self) -> None:
        """One more token for every live sequence."""
        if not self._live:
            return
        if self._attention is None:
            self._live.sort(key=_batch_order)
            self._attention = DecodeAttention([sequence.lane for sequence in self._live if sequence.lane is not None])
        live = list(self._live)
        positions = [sequence.last_position for sequence in live]
        self._attention.begin(positions)
        logits_BV = self._forward.decode(
            [sequence.tokens[-1] for sequence in live],
            positions,
            [sequence.request.snapshot_id for sequence in live],
            self._attention,
        )
        self._draw(logits_BV, live)

    def _draw(self, logits_BV: Tensor, sequences: list[_Live]) -> None:
        """Draw and append one token for each sequence; those that end with it leave."""
        device = logits_BV.device
        if self._ranks.tp_rank == 0:
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
            tokens_B, logprobs_B = sample_tokens(logits_BV, rows)
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
            self._events.append(_Failed(sequence.request_index, message))
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


def _ended(sequence: _Live, reason: StopReason, dp_rank: int) -> _Ended:
    topk = None
    if sequence.request.topk_sample_logprobs and sequence.tokens:
        topk = TokenLogprobs(*(np.stack(column) for column in zip(*sequence.topk, strict=True)))
    sampled = SampledSequence(
        np.asarray(sequence.tokens, dtype=np.int32), np.asarray(sequence.logprobs, dtype=np.float32), reason, topk
    )
    return _Ended(sequence.request_index, sequence.sample_index, sampled, dp_rank)
