"""Samples that one rank has yet to start: one queue for each sampler, and whose turn it is.

Which weights it asks for is all that is known here of who asks. Each queue is in order of arrival. When something of a
queue was started, all others have their turn before it has the next.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .sample_request import SampleRequest


@dataclass
class Waiting:
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


class WaitingQueues:
    """The first of each queue, in order of their turns: `len` of them, the next in turn at 0."""

    def __init__(self) -> None:
        self._queues: list[deque[Waiting]] = []  # none is empty

    def __len__(self) -> int:
        return len(self._queues)

    def __getitem__(self, place: int) -> Waiting:
        return self._queues[place][0]

    def append(self, waiting: Waiting) -> None:
        for queue in self._queues:
            if queue[0].request.snapshot_id == waiting.request.snapshot_id:
                queue.append(waiting)
                return
        self._queues.append(deque([waiting]))

    def had_turn(self, place: int) -> None:
        """Some or all samples of the first of this queue were taken out."""
        queue = self._queues.pop(place)
        if not queue[0].samples:
            queue.popleft()
        if queue:
            self._queues.append(queue)

    def drop(self, request_index: int | None) -> None:
        """What is left of a request; None: of every request."""
        left = [deque(x for x in queue if request_index not in (None, x.request_index)) for queue in self._queues]
        self._queues = [queue for queue in left if queue]
