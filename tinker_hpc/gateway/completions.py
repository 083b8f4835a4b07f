"""Which samples are done, told in batches: one held question a sampling client, instead of one for each of its samples.

The SDK (tinker 0.28 on, where the configuration says so) then fetches each answer it was told of. Lives on the event
loop alone: no locks.

A cursor numbers what was told. It starts at the clock's nanoseconds, so that a client which outlived a restart of the
gateway holds an older one: it is told everything again that the log knows, and skips what it has.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

MAX_TOLD = 64
"""At once. The client fetches all it was told of at the same time, each over a connection of its own."""

Target = tuple[str, int]
"""sampling_session_id, and which copy of the sampling client (0: the original)."""
COPY_SEQ_IDS = 1_000_000_000
"""Each copy of a sampling client numbers its requests in a block of its own (tinker 0.38, sampling_client.py)."""


def target_of(sampling_session_id: str, seq_id: int) -> Target:
    """Which client sent the request."""
    return sampling_session_id, seq_id // COPY_SEQ_IDS


@dataclass(slots=True, eq=False)
class _Line:
    """The samples of one client. `pending`: accepted and not told; `told`: by cursor, until the client has seen it."""

    pending: dict[str, None] = field(default_factory=dict)
    told: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque)
    scout: str | None = None
    changed: asyncio.Event | None = None

    def wake(self) -> None:
        if self.changed is not None:
            self.changed.set()
            self.changed = None


class Completions:
    """All sampling clients of this gateway."""

    def __init__(self) -> None:
        self._lines: dict[Target, _Line] = {}
        self._cursor = time.time_ns()

    def expect(self, target: Target, request_id: str) -> None:
        """A sample was accepted, or is about to be; or a loop that was started again asks for it, whose predecessor may
        have been told of it before it was done.
        """
        line = self._lines.setdefault(target, _Line())
        line.pending[request_id] = None
        if line.scout == request_id:
            line.scout = None

    def forget(self, target: Target, request_id: str) -> None:
        """It was not accepted after all."""
        self._lines[target].pending.pop(request_id, None)

    def finished(self, target: Target, request_id: str, num_bytes: int | None) -> None:
        """A sample is answered. `num_bytes`: of the answer, None where it is an error."""
        line = self._lines[target]
        if line.scout == request_id:
            line.scout = None
        if request_id not in line.pending:
            return  # told before: it failed with its worker, or went ahead as a scout
        if num_bytes is None:
            self._tell(line, request_id, {"state": "failed"})
        else:
            self._tell(line, request_id, {"state": "finished", "response_payload_uncompressed_size": num_bytes})
        line.wake()

    def again(self, target: Target, request_id: str) -> None:
        """A loop that was started again asks for an answered sample: tell it what its predecessor was told."""
        line = self._lines.setdefault(target, _Line())
        line.pending[request_id] = None
        self._tell(line, request_id, {"state": "finished"})
        line.wake()

    def give_up(self, target: Target) -> None:
        """No answer will come to what is pending: the client fetches the reason."""
        line = self._lines.get(target, _Line())
        for request_id in list(line.pending):
            self._tell(line, request_id, {"state": "failed"})

    def send_scout(self, target: Target) -> None:
        """Tell of the oldest pending sample although it is not done: the client asks for it, and so hears why it waits.

        The answers of this question have no room for a queue state, those of a single sample do.
        """
        line = self._lines.get(target, _Line())
        if line.scout is None and line.pending:
            line.scout = next(iter(line.pending))
            self._tell(line, line.scout, {"state": "finished"})

    def after(self, target: Target, cursor: int) -> tuple[list[dict[str, Any]], int]:
        """What was told beyond `cursor`, at most MAX_TOLD, and the cursor to come back with. Forgets what lies before.

        Args: cursor: of an earlier answer, 0 at first; one of another gateway counts as 0.
        """
        line = self._lines.get(target, _Line())
        while line.told and line.told[0][0] <= cursor <= self._cursor:
            line.told.popleft()
        found = [line.told[index] for index in range(min(MAX_TOLD, len(line.told)))]
        return [completion for _, completion in found], found[-1][0] if found else cursor

    def wake(self) -> None:
        """The state of a worker changed: every held question looks again."""
        for line in self._lines.values():
            line.wake()

    async def change(self, target: Target, timeout_s: float) -> None:
        """Wait until something changes for this client, at most `timeout_s`."""
        line = self._lines.setdefault(target, _Line())
        if line.changed is None:
            line.changed = asyncio.Event()
        try:
            await asyncio.wait_for(line.changed.wait(), timeout_s)
        except TimeoutError:
            return

    def _tell(self, line: _Line, request_id: str, completion: dict[str, Any]) -> None:
        del line.pending[request_id]
        self._cursor += 1
        line.told.append((self._cursor, {**completion, "request_id": request_id}))
