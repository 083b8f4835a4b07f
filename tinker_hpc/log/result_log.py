"""Step 7 of a request. Before: worker/publisher.py. After: gateway (the future's answer).

The result log: one folder of segments per fencing number, so that no two workers ever write into the same one.

    results/<fence>/seg-...     first record always `sealed`: {"limits": {older fence: how many of its records count}}
    results/newest              the highest fence that has a folder (looking.py)

A worker that takes over makes its folder and tells its number, *then* counts what its predecessors have published, and
seals that. A reader reads new records first and *then* looks which fences there are: if it sees none newer than those
it read, no seal can leave those records out (a newer one was told after we looked, so it counts them). If it sees a
newer fence that has not sealed yet it holds them back until the seal says which count. Both looks must be at what is
there now: an old listing would let a reader take what does not count, and a worker count too little.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from tinker_hpc.errors import CorruptLogError, DataRootError, LeaseLostError
from tinker_hpc.log.appender import Appender
from tinker_hpc.log.lease import Lease
from tinker_hpc.log.looking import list_anew, list_names, newest_told, tell_newest
from tinker_hpc.log.record import Record, encode_parts
from tinker_hpc.log.request_log import POLL_BYTES, LogReader
from tinker_hpc.log.segment import Segment, last_contiguous, list_segments, outermost, read_segment, segments_of
from tinker_hpc.private_files import fsync_folder, make_private
from tinker_hpc.run_folder import WorkerFolder


class ResultLog:
    """Publishes results under a lease. Thread-safe."""

    def __init__(self, worker_folder: Path, lease: Lease) -> None:
        """Seal what older workers wrote and open this lease's own folder.

        Raises: LeaseLostError if the lease is already taken over; DataRootError if the disk refuses.
        """
        results = make_private(WorkerFolder(worker_folder).results)
        self.lease = lease
        self._lock = threading.Lock()
        self._appender = Appender(_fence_folder(results, lease.fence))
        _synced(results)
        if self._appender.last:
            raise LeaseLostError(f"lease {lease.fence} of {worker_folder} was used before; acquire a new one")
        tell_newest(results, lease.fence)
        self.limits = _limits_below(results, lease.fence)
        """How many records of each older fence count."""
        try:
            self.publish([Record({"op": "sealed", "limits": {str(f): n for f, n in self.limits.items()}})])
        except DataRootError as error:
            if not error.attributes.get("visible"):
                raise

    def publish(self, records: Sequence[Record]) -> None:
        """Write `records` in this order, visible together, durable on return.

        `fence` and `number` (position in the log of that fence, from 1) are put into their headers.

        Raises: LeaseLostError if another worker took over (the records may be in the log, but do not count).
            DataRootError if the disk refuses; nothing was published unless its `visible` is True.
        """
        if not records:
            return
        with self._lock:
            first, fence = self._appender.last + 1, self.lease.fence
            headers = [{**r.header, "fence": fence, "number": n} for n, r in enumerate(records, first)]
            parts = [encode_parts(Record(h, r.arrays)) for h, r in zip(headers, records, strict=True)]
            self.lease.check()
            self._appender.append(parts)
            with contextlib.suppress(DataRootError):  # they are there: to publish them again would be wrong
                self.lease.check()

    def close(self) -> None:
        """Wait for a merge under way."""
        self._appender.close()


class ResultFinder:
    """Reads single results by where they are (`fence` and `number` of their headers). Thread-safe.

    The segment read last stays in memory: a loop that is started again asks for one result after the other. So does
    what was found in each folder; it is listed again, from the asked number on, when that is not where it was, or new.
    """

    def __init__(self, worker_folder: Path) -> None:
        self._results = WorkerFolder(worker_folder).results
        self._lock = threading.Lock()
        self._held: tuple[int, int, list[Record]] = (0, 0, [])  # fence, number of the first, records
        self._listed: dict[int, list[Segment]] = {}  # by fence, as `outermost` leaves them

    def find(self, fence: int, number: int) -> Record | None:
        """That record; None if it is not to be seen. Raises: CorruptLogError."""
        with self._lock:
            held_fence, first, records = self._held
            if held_fence != fence or not first <= number < first + len(records):
                if (read := self._read(fence, number, look=False) or self._read(fence, number, look=True)) is None:
                    return None
                first, records = read
                self._held = (fence, first, records)
            return records[number - first]

    def _read(self, fence: int, number: int, *, look: bool) -> tuple[int, list[Record]] | None:
        """Number of the first and all records of the segment that holds `number`; None if it is not there.

        Args: look: list the folder first, in place of believing what was found in it before.
        """
        folder, listed = _fence_folder(self._results, fence), self._listed.get(fence, [])
        index = bisect_left(listed, number, key=lambda segment: segment.last)
        if look:
            listed[index:] = outermost(list_segments(folder, number - 1))
            self._listed[fence] = listed
        if index == len(listed) or listed[index].first > number:
            return None
        records = read_segment(folder, listed[index])
        return None if records is None else (listed[index].first, records)


class ResultReader:
    """Reads the results that count, across all fences. One thread at a time."""

    def __init__(self, worker_folder: Path) -> None:
        """Start at the beginning. The folders need not exist yet."""
        self._results = WorkerFolder(worker_folder).results
        self._readers: dict[int, LogReader] = {}
        self._limits: dict[int, int] = {}
        self._sealed_by = 0  # the fence `_limits` are from
        self.at_end = False
        """The last poll held nothing back and left nothing unread that was there."""

    def poll(self, max_bytes: int = POLL_BYTES) -> list[Record]:
        """Records that became visible and count, older fences first, each fence in order; [] if there are none.

        Returns after about `max_bytes`; poll again until it returns nothing.
        Raises: CorruptLogError, DataRootError as LogReader.poll.
        """
        found: list[Record] = []
        try:
            self._poll(found, max_bytes)
        except (CorruptLogError, DataRootError):
            if not found:
                raise
        return found

    def _poll(self, found: list[Record], max_bytes: int) -> None:
        newest = max(_list_fences(self._results), default=0)
        self.at_end = newest == 0
        if newest == 0 or not self._read_seal(newest):
            return
        for fence, limit in sorted(self._limits.items()):
            reader = self._reader(fence)
            if reader.position < limit:
                found += reader.poll(max_bytes - _num_bytes(found), until=limit, promised=limit)
            if reader.position < limit:  # cut by max_bytes, or a lagging filesystem: later fences wait their turn
                return
        reader = self._reader(newest)
        before = reader.position
        fresh = reader.poll(max_bytes - _num_bytes(found))
        counts = False
        try:
            counts = not fresh or max(_list_fences(self._results)) == newest
        finally:
            if not counts:  # a newer worker may have sealed without them: read again when its seal is there
                reader.position = before
        if counts:
            found += fresh
            self.at_end = not fresh

    def _read_seal(self, fence: int) -> bool:
        if self._sealed_by != fence:
            limits = _seal_of(self._results, fence)
            if limits is None:
                return False
            self._limits, self._sealed_by = limits, fence
        return True

    def _reader(self, fence: int) -> LogReader:
        written = {"fence": fence, "number": "number"}
        return self._readers.setdefault(fence, LogReader(_fence_folder(self._results, fence), written=written))


def _limits_below(results: Path, fence: int) -> dict[int, int]:
    """How many records of each older fence count, as the worker with lease `fence` finds them now."""
    older = [int(name) for name in list_anew(results) if name.isdigit() and int(name) < fence]
    limits = dict.fromkeys(older, 0)  # a predecessor that had not sealed yet has nothing that counts
    for predecessor in sorted(older, reverse=True):
        folder = _fence_folder(results, predecessor)
        published = last_contiguous(segments_of(list_anew(folder)))
        if published:
            limits[predecessor] = published
            return limits | (_seal_of(results, predecessor) or {})
    return limits


def _seal_of(results: Path, fence: int) -> dict[int, int] | None:
    """The limits in the first record of a fence; None while it is not there."""
    first = LogReader(_fence_folder(results, fence)).poll(until=1)
    return {int(f): n for f, n in first[0].header["limits"].items()} if first else None


def _list_fences(results: Path) -> list[int]:
    """Those that have a folder, listed and told. Raises: DataRootError."""
    told = newest_told(results)
    return sorted({int(name) for name in list_names(results) if name.isdigit()} | ({told} if told else set()))


def _synced(folder: Path) -> None:
    try:
        fsync_folder(folder)
    except OSError as error:
        raise DataRootError(f"cannot sync {folder}: {error.strerror}.", path=str(folder)) from error


def _fence_folder(results: Path, fence: int) -> Path:
    return results / f"{fence:08d}"


def _num_bytes(records: Sequence[Record]) -> int:
    return sum(a.nbytes for r in records for a in r.arrays.values())
