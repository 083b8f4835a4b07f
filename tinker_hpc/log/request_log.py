"""Step 4 of a request. Before: gateway/app.py. After: worker/loop.py.

The request log: one writer (the gateway), any number of readers. A request is durable when `append` returns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinker_hpc.errors import DataRootError
from tinker_hpc.log.appender import Appender
from tinker_hpc.log.record import Buffer, Record, encode_parts
from tinker_hpc.log.segment import RETRY_S, chain, list_segments, read_segment

GROUP_BYTES = 64 << 20
"""Largest segment a group commit makes out of several callers' records; readers take a segment whole into memory."""
POLL_BYTES = 256 << 20
"""`poll` returns after about this much, so that a long log is read in pieces."""


@dataclass
class _Waiting:
    """One caller's records on their way to the disk."""

    records: Sequence[Record]
    num_bytes: int
    seqs: list[int] = field(default_factory=list)
    error: Exception | None = None
    done: bool = False


class RequestLog:
    """Appends requests. Thread-safe: callers that arrive while another one syncs share the next sync."""

    def __init__(self, folder: Path) -> None:
        """Open as the only writer; continues behind the last record.

        Raises: CorruptLogError if the log is damaged; DataRootError if the folder cannot be written.
        """
        self._appender = Appender(folder)
        self._commit_lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()  # append and popleft are atomic

    @property
    def last(self) -> int:
        """`seq` of the newest record, 0 for an empty log."""
        return self._appender.last

    def append(self, records: Sequence[Record]) -> list[int]:
        """Write `records`, in this order, and return their `seq` once they are durable.

        The records of one call become visible together. `seq` is put into the written headers.

        Raises: DataRootError if the disk is full, over quota or failing. The records were not accepted then, and a
            later append works once there is room (`error.visible` True: they may have been accepted; appending them
            again under the same request_id is right, the worker runs a request once).
            TypeError if a header or an array cannot be encoded; the other callers' records are not affected.
        """
        if not records:
            return []
        waiting = _Waiting(records, sum(a.nbytes for r in records for a in r.arrays.values()))
        self._queue.append(waiting)
        with self._commit_lock:
            while not waiting.done:  # else another caller has written ours along with its own
                self._commit(self._take())
        if isinstance(waiting.error, DataRootError):  # shared by several threads: each raises its own
            raise DataRootError(waiting.error.message, **waiting.error.attributes) from waiting.error
        if waiting.error is not None:
            raise waiting.error
        return waiting.seqs

    def close(self) -> None:
        """Wait for a merge under way. Appending afterwards is still allowed."""
        self._appender.close()

    def _take(self) -> list[_Waiting]:
        """The callers waiting longest, as many as fit in one segment and at least one."""
        taken, total = [], 0
        while self._queue and (not taken or total + self._queue[0].num_bytes <= GROUP_BYTES):
            total += self._queue[0].num_bytes
            taken.append(self._queue.popleft())
        return taken

    def _commit(self, group: Sequence[_Waiting]) -> None:
        encoded: list[list[Buffer]] = []
        for waiting in group:
            first = self._appender.last + 1 + len(encoded)
            waiting.seqs = list(range(first, first + len(waiting.records)))
            try:
                numbered = zip(waiting.records, waiting.seqs, strict=True)
                encoded += [encode_parts(Record({**r.header, "seq": seq}, r.arrays)) for r, seq in numbered]
            except (TypeError, ValueError) as error:
                waiting.error = error
        accepted = [waiting for waiting in group if waiting.error is None]
        try:
            if accepted:
                self._appender.append(encoded)
        except DataRootError as error:
            for waiting in accepted:
                waiting.error = error
        finally:
            for waiting in group:
                waiting.done = True


class LogReader:
    """Reads one folder of segments from a position on. One thread at a time."""

    def __init__(self, folder: Path, after: int = 0, *, retry_s: float = RETRY_S) -> None:
        """Start behind record `after` (0: at the beginning). The folder need not exist yet."""
        self.folder = folder
        self.position = after
        self._retry_s = retry_s

    def poll(self, max_bytes: int = POLL_BYTES, *, until: int | None = None) -> list[Record]:
        """The records that became visible since the last poll, in order, up to number `until`; [] if there are none.

        Returns after about `max_bytes`; poll again until it returns nothing. A missing number ends the poll: it, and
        what follows it, comes with a later one.

        Raises: CorruptLogError naming the file and the offset of a damaged record; the position does not move.
        """
        found: list[Record] = []
        num_bytes = 0
        segments = deque(chain(list_segments(self.folder), self.position))
        relisted = False
        while segments and num_bytes < max_bytes and (until is None or self.position < until):
            segment = segments.popleft()
            records = read_segment(self.folder, segment, retry_s=self._retry_s)
            if records is None:  # merged away since we listed: list once more, then let the caller wait
                segments = deque() if relisted else deque(chain(list_segments(self.folder), self.position))
                relisted = True
                continue
            relisted = False
            last = segment.last if until is None else min(segment.last, until)
            new = records[self.position + 1 - segment.first : last + 1 - segment.first]
            found += new
            num_bytes += sum(256 + sum(a.nbytes for a in r.arrays.values()) for r in new)
            self.position = last
        return found
