"""Step 6 of a request, sampling. Before: worker/sample_step.py. After: worker publishes each result as it finishes.

Continuous batching: all live sequences, whatever their adapter, advance together by one token a step; new requests join
between steps. This file is what all ranks do alike: requests come in and are dealt out, results are put together. What
each rank does with its own sequences is in own_sequences.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .kv_cache import KvCache
from .own_sequences import Event, Failed, OwnSequences, Scored
from .sample_ranks import SampleRanks, Shares
from .sample_request import PromptScores, SampledSequence, SampleRequest, SampleResult, most_tokens, refusal
from .stopping import DecodeText
from .token_forward import TokenForward
from .waiting_samples import Waiting

OnFinished = Callable[[int, SampleResult], None]
Admit = Callable[[], Sequence[SampleRequest]]


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
        self._reset()

    def _reset(self) -> None:
        self._own = OwnSequences(
            self._forward,
            self._cache,
            self._ranks,
            vocab_size=self._vocab_size,
            decode_text=self._decode_text,
            prefill_tokens=self._prefill_tokens,
        )
        self._open: dict[int, _Open] = {}
        self._cancelled: dict[int, str] = {}
        self._num_arrived = 0
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
            on_finished: called on every rank as each request is answered, with its place in the order of arrival. The
                answer is then the caller's alone: a run that others keep joining may last for days.
            admit: called before every step, the same number of times on every rank; must return the same requests on
                every rank. The run ends when nothing is left, so what arrives later is for the next run.
            max_live: most sequences that this rank advances at once, beside what the cache has room for, until
                `requests` are answered: it was found for them, and others may keep joining for days.
        Returns: without `on_finished`, one result per request in order of arrival, on every rank; with it nothing.
            A request that cannot be served has `error` set and disturbs no other.
        Collectives: those of the model's passes and of `SampleRanks`.
        """
        self._own.max_live = max_live
        results: dict[int, SampleResult] = {}
        on_finished = on_finished or results.__setitem__
        try:
            self._accept(requests, on_finished)
            while True:
                if admit is not None:
                    self._accept(admit(), on_finished)
                    self._give_up_cancelled(on_finished)
                if not self._open:
                    break
                if next(iter(self._open)) >= len(requests):  # in order of arrival
                    self._own.max_live = None
                self._own.start_waiting()
                self._own.step()
                self._forward.join_others()
                self._settle(on_finished)
            return [results[index] for index in sorted(results)]
        finally:
            self._own.drop(None, tainted=True)  # some only after an exception: the lanes must not stay taken
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

    def _accept(self, requests: Sequence[SampleRequest], on_finished: OnFinished) -> None:
        good = []
        for index, request in enumerate(requests, start=self._num_arrived):
            if message := self._refusal(request):
                on_finished(index, SampleResult(error=message))
            else:
                good.append((index, request))
        self._num_arrived += len(requests)
        shares = self._shares.deal([request.num_samples for _, request in good])
        for (index, request), parts in zip(good, shares, strict=True):
            self._open[index] = _Open(request.num_samples, parts=parts)
            max_tokens = self._max_tokens(request)
            for part, (dp_rank, samples) in enumerate(parts):
                if dp_rank == self._ranks.dp_rank:
                    scored = request.scores_prompt and part == 0
                    self._own.waiting.append(Waiting(index, request, deque(samples), max_tokens, scored))

    def _max_tokens(self, request: SampleRequest) -> int:
        # With no wish of its own, a request takes what the cache can hold.
        limit = self._cache.longest() if request.max_tokens is None else self._cache.max_context
        return most_tokens(request, limit)

    def _refusal(self, request: SampleRequest) -> str | None:
        if message := refusal(request, vocab_size=self._vocab_size, max_context=self._cache.max_context):
            return message
        if request.snapshot_id is not None and request.snapshot_id not in self._known_snapshots():
            return f"sampler weights {request.snapshot_id!r} are not loaded on this worker"
        if request.max_tokens is None and len(request.prompt) > self._cache.longest():
            return (
                f"prompt of {len(request.prompt)} tokens, no max_tokens given; this worker's memory holds "
                f"{self._cache.longest()} cached tokens, no room for a continuation: shorten the prompt, run on more "
                "or larger GPUs, or use max_tokens=1, which caches nothing"
            )
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
            except Exception as error:  # transformers and tokenizers raise what a wrong file happens to break in them
                return (
                    "stop strings need the model's tokenizer, which did not load: "
                    f"{type(error).__name__}: {error}. Stop on token ids instead"
                )
        return None

    def _settle(self, on_finished: OnFinished) -> None:
        events: list[Event] = self._ranks.exchange(self._own.take_events())
        for event in events:
            entry = self._open.get(event.request_index)
            if entry is None:  # another sample of the request failed before
                continue
            if isinstance(event, Failed):
                self._abandon(event.request_index, entry, tainted=True)
                on_finished(event.request_index, SampleResult(error=event.message))
            elif isinstance(event, Scored):
                entry.scores = event.scores
            else:
                entry.sequences[event.sample_index] = event.sequence
                self._shares.done(event.dp_rank, 1)
                if len(entry.sequences) == entry.num_samples:
                    del self._open[event.request_index]
                    sequences = [entry.sequences[sample] for sample in range(entry.num_samples)]
                    on_finished(event.request_index, SampleResult(sequences, entry.scores))

    def _give_up_cancelled(self, on_finished: OnFinished) -> None:
        for index, reason in self._cancelled.items():
            if index in self._open:
                self._abandon(index, self._open[index], tainted=False)
                on_finished(index, SampleResult(error=reason))
        self._cancelled.clear()

    def _abandon(self, index: int, entry: _Open, *, tainted: bool) -> None:
        for dp_rank, samples in entry.parts:
            self._shares.done(dp_rank, sum(sample not in entry.sequences for sample in samples))
        del self._open[index]
        self._own.drop(index, tainted=tainted)
