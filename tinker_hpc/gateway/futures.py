"""What became of each accepted request. Lives on the event loop alone: no locks.

A request id handed out is known for ever (and again after a restart, from the log). Answers are kept in memory up to a
number of bytes; an older one is read from the result log again when somebody still asks.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tinker_hpc.gateway.answers import Answer, reply_of, reply_of_sample
from tinker_hpc.gateway.completions import Completions, Target
from tinker_hpc.gateway.wire import PROTOBUF

MAX_ANSWER_BYTES = 256 * 2**20


@dataclass(slots=True, eq=False)
class Future:
    """One accepted (or being accepted) request.

    Attributes:
        worker_index: whose log holds it.
        digest: of the payload; a retry must have the same.
        facts: what encoding the answer needs of the request (`facts_of`).
        target: the sampling client that sent it; None for anything but a sample.
        num_samples: how many sequences it asked for.
        seq, accepted_at: its place in that log; 0 while the record is on its way to the disk.
        loop_start: which start of the loop asked for it last (replay.py).
        durable: done when the record is on disk, failed when it could not be written; None once it is there.
        done: it has a result (whose body may have left the memory).
        where: that result's place in the result log: fence and number; None for what the gateway answered itself.
    """

    request_id: str
    op: str
    model_id: str | None
    seq_id: int | None
    worker_index: int
    digest: str
    facts: dict[str, Any] = field(default_factory=dict)
    target: Target | None = None
    num_samples: int = 0
    seq: int = 0
    accepted_at: float = 0.0
    loop_start: int = 0
    where: tuple[int, int] | None = None
    durable: asyncio.Future[None] | None = None
    done: bool = False
    _changed: asyncio.Event | None = None

    @property
    def reply(self) -> dict[str, Any]:
        """What the accepting endpoint answered, and answers to a retry. Not kept: every sample of a run is known for
        ever, and the ids of 64 sequences would outweigh all else that is known of it.
        """
        if self.target is not None:
            return reply_of_sample(self.request_id, self.num_samples)
        return reply_of(self.op, self.request_id, self.model_id, self.facts)

    @property
    def unclear(self) -> bool:
        """Its record may be seen by the worker, and run, but is not known to be durable: it was not accepted yet."""
        return self.durable is not None and self.durable.done()

    async def change(self, timeout_s: float) -> None:
        """Wait until woken, at most `timeout_s`."""
        if self._changed is None:
            self._changed = asyncio.Event()
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    def wake(self) -> None:
        """Let everybody who waits look again."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None


class FutureTable:
    """All futures by request id; the answers of the recent ones."""

    def __init__(self, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._futures: dict[str, Future] = {}
        self._pending: dict[int, dict[str, Future]] = {}
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._answer_bytes = 0
        self.completions = Completions()
        self._max_answer_bytes = max_answer_bytes

    def get(self, request_id: str) -> Future | None:
        return self._futures.get(request_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._futures

    def add(self, future: Future) -> None:
        self._futures[future.request_id] = future
        if not future.done:
            self._pending.setdefault(future.worker_index, {})[future.request_id] = future
            if future.target is not None:
                self.completions.expect(future.target, future.request_id)

    def drop(self, future: Future) -> None:
        """Forget a request that was not accepted after all."""
        self._futures.pop(future.request_id, None)
        self._pending.get(future.worker_index, {}).pop(future.request_id, None)
        if future.target is not None:
            self.completions.forget(future.target, future.request_id)

    def pending(self, worker_index: int) -> int:
        """How many accepted requests of that worker wait for a result."""
        return len(self._pending.get(worker_index, ()))

    def finish(self, request_id: str, answer: Answer, where: tuple[int, int] | None = None) -> None:
        """Record the answer. The first one counts; a second result of the same request changes nothing."""
        future = self._futures.get(request_id)
        if future is None:
            return
        if not future.done:
            future.done, future.where = True, where
            self._pending.get(future.worker_index, {}).pop(request_id, None)
            self.keep(request_id, answer)
            if future.target is not None:
                num_bytes = len(answer.body) if answer.media_type == PROTOBUF else None
                self.completions.finished(future.target, request_id, num_bytes)
        future.wake()

    def keep(self, request_id: str, answer: Answer) -> None:
        """Hold an answer in memory, letting the oldest go beyond the limit (the newest always stays)."""
        previous = self._answers.pop(request_id, None)
        if previous is not None:
            self._answer_bytes -= len(previous.body)
        self._answers[request_id] = answer
        self._answer_bytes += len(answer.body)
        while self._answer_bytes > self._max_answer_bytes and len(self._answers) > 1:
            _, oldest = self._answers.popitem(last=False)
            self._answer_bytes -= len(oldest.body)

    def release(self, request_id: str) -> None:
        """The client has the answer: its body leaves the memory. Asked for again it is read from the log."""
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self._answer_bytes -= len(answer.body)

    def answer(self, request_id: str) -> Answer | None:
        """The answer, if it is still in memory."""
        return self._answers.get(request_id)

    def wake_pending(self, worker_index: int) -> None:
        """The worker's state changed: everybody who waits for it looks again."""
        for future in list(self._pending.get(worker_index, {}).values()):
            future.wake()
        self.completions.wake()

    def __iter__(self) -> Iterator[Future]:
        return iter(list(self._futures.values()))

    def __len__(self) -> int:
        return len(self._futures)
