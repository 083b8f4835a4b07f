"""Step 4 of a request. Before: gateway/app.py. After: worker/loop.py.

The request log: one writer (the gateway), any number of readers. A request is durable when `append` returns.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinker_hpc.errors import CorruptLogError, DataRootError, LeaseLostError
from tinker_hpc.log import looking
from tinker_hpc.log.appender import Appender
from tinker_hpc.log.lease import Lease
from tinker_hpc.log.record import Buffer, Record, encode_parts
from tinker_hpc.log.segment import RETRY_S, Segment, chain, list_segments, missing, read_segment
from tinker_hpc.private_files import read_json, write_json

COMPACTED = "compacted.json"
KEEP_BYTES = 4 << 30
"""Payloads are compacted away only beyond this much: while they are there, a loop that was started again may leave the
recorded path at any point of it."""
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

    def __init__(self, folder: Path, lease: Lease | None = None) -> None:
        """Open as the only writer; continues behind the last record.

        Args: lease: looked at before every append; a process that lost it writes nothing more.
        Raises: CorruptLogError if the log is damaged; DataRootError if the folder cannot be written.
        """
        self._lease = lease
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
            later append works once there is room (`error.visible` True: they may have been accepted, as `error.seqs`;
            appending them again under the same request_id is right, the worker runs a request once).
            LeaseLostError if another process writes here: this one must end.
            TypeError if a header or an array cannot be encoded; the other callers' records are not affected.
        """
        if not records:
            return []
        waiting = _Waiting(records, sum(a.nbytes for r in records for a in r.arrays.values()))
        self._queue.append(waiting)
        with self._commit_lock:
            while not waiting.done:  # else another caller has written ours along with its own
                self._commit(self._take())
        if isinstance(waiting.error, LeaseLostError):
            raise LeaseLostError(waiting.error.message, **waiting.error.attributes) from waiting.error
        if isinstance(waiting.error, DataRootError):  # shared by several threads: each raises its own
            attributes = {**waiting.error.attributes, "seqs": waiting.seqs}
            raise DataRootError(waiting.error.message, **attributes) from waiting.error
        if waiting.error is not None:
            raise waiting.error
        return waiting.seqs

    @property
    def compacted(self) -> int:
        """Up to here requests may have lost their payload."""
        return compacted_through(self._appender.folder)

    def compact(self, through: int, needed: Container[int], *, keep_bytes: int = KEEP_BYTES) -> int:
        """Drop the payload (arrays) of requests that no snapshot leaves to redo, the oldest first, while the log takes
        more than `keep_bytes`. Headers stay: they are what a restarted gateway and a loop's replay need.

        Args:
            through: `seq` up to which every request is in all snapshots, but those in `needed`.
        Returns: up to which request payloads are gone. Raises: DataRootError, CorruptLogError.
        """
        last = self._appender.last_beyond(through, keep_bytes)
        if last <= self.compacted:
            return self.compacted
        # First the word, then the deed: whoever reads it never believes a payload to be there that is not.
        write_json(self._appender.folder / COMPACTED, {"through": last})

        def shrink(record: Record) -> Record:
            if record.header["seq"] in needed or not record.arrays:
                return record
            return Record({**record.header, "compacted": True})

        self._appender.compact(last, keep_bytes, shrink)
        return last

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
                if self._lease is not None:
                    self._lease.check()
                self._appender.append(encoded)
        except (DataRootError, LeaseLostError, OSError) as error:
            for waiting in accepted:
                waiting.error = error
        finally:
            for waiting in group:
                waiting.done = True


def compacted_through(folder: Path) -> int:
    """Up to which request of this log payloads may be gone; 0 if none is."""
    return int((read_json(folder / COMPACTED) or {}).get("through", 0))


class LogReader:
    """Reads one folder of segments from a position on. One thread at a time."""

    def __init__(
        self, folder: Path, after: int = 0, *, retry_s: float = RETRY_S, written: Mapping[str, str | int] | None = None
    ) -> None:
        """Start behind record `after` (0: at the beginning). The folder need not exist yet.

        Args: written: what this log's writer puts into every header: {"<field>": value}, where the value "number"
            stands for the record's own. A record that says otherwise is not its.
        """
        self.folder = folder
        self._written = dict(written or {})
        self.position = after
        self._retry_s = retry_s
        self._waiting_since: float | None = None  # for a record that ought to be there

    def poll(self, max_bytes: int = POLL_BYTES, *, until: int | None = None, promised: int = 0) -> list[Record]:
        """The records that became visible since the last poll, in order, up to number `until`; [] if there are none.

        Returns after about `max_bytes`; poll again until it returns nothing. A missing number ends the poll: it, and
        what follows it, comes with a later one.

        Args: promised: records up to this number are known to be there.
        Raises: CorruptLogError naming the file and the offset of a damaged record, or one that is missing although
            later ones are there, or `promised`, for LAG_S; DataRootError if the disk refuses.
            What was read before it is returned first: the error comes with the next poll.
        """
        found: list[Record] = []
        try:
            listed = self._poll(found, max_bytes, until)
            self._check_there(found, listed, promised, until)
        except (CorruptLogError, DataRootError):
            if not found:
                raise
        return found

    def _check_there(
        self, found: Sequence[Record], listed: Sequence[Segment], promised: int, until: int | None
    ) -> None:
        """A number that no name covers is not there yet, for as long as a filesystem may take to show it."""
        later = max(listed, key=lambda segment: segment.last, default=None)
        reach = max(promised, later.last if later else 0)
        if until is not None:
            reach = min(reach, until)
        if found or self.position >= reach:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > looking.LAG_S:
            beyond = later if later is not None and later.first > self.position + 1 else None
            raise CorruptLogError(missing(self.folder, self.position + 1, beyond), path=str(self.folder))

    def _poll(self, found: list[Record], max_bytes: int, until: int | None) -> list[Segment]:
        """Adds to `found`. Returns: every segment there is to be seen that holds something new."""
        num_bytes = 0
        listed = list_segments(self.folder, self.position)
        segments = deque(chain(listed, self.position))
        relisted = False
        while segments and num_bytes < max_bytes and (until is None or self.position < until):
            segment = segments.popleft()
            records = read_segment(self.folder, segment, retry_s=self._retry_s)
            if records is None:  # merged away since we listed: list once more, then let the caller wait
                again = [] if relisted else list_segments(self.folder, self.position)
                segments = deque(chain(again, self.position))
                relisted = True
                continue
            relisted = False
            last = segment.last if until is None else min(segment.last, until)
            new = records[self.position + 1 - segment.first : last + 1 - segment.first]
            self._check_writer(new, segment)
            found += new
            num_bytes += sum(256 + sum(a.nbytes for a in r.arrays.values()) for r in new)
            self.position = last
        return listed

    def _check_writer(self, records: Sequence[Record], segment: Segment) -> None:
        for number, record in enumerate(records, self.position + 1):
            for key, value in self._written.items():
                expected = number if value == "number" else value
                if record.header.get(key) != expected:
                    raise CorruptLogError(
                        f"{self.folder / segment.name}: record {number} says {key} {record.header.get(key)!r}, this "
                        f"log's writer would say {expected!r}. Somebody else put it there; it is not believed.",
                        path=str(self.folder / segment.name),
                    )
