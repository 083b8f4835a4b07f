"""The one writer of one folder of segments: numbers records, publishes them, and keeps the number of files small."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tinker_hpc.errors import CorruptLogError, DataRootError, LeaseLostError, TinkerHpcError
from tinker_hpc.log.looking import MOST_NAMES, TEMPORARY, list_anew, tell_names
from tinker_hpc.log.record import Buffer, Record, encode_parts
from tinker_hpc.log.segment import (
    Segment,
    chain,
    missing,
    read_segment,
    replace_segment,
    segments_of,
    write_segment,
)
from tinker_hpc.private_files import make_private

FANOUT = 32
"""Merge this many neighbours of one size class: n appends leave about FANOUT * log_FANOUT(n) files."""
MERGE_BYTES = 64 << 20
"""Never merge into more than this: copying big payloads again would cost more than the inodes they take."""


class Appender:
    """Appends encoded records to `folder`. Not thread-safe but for the merging thread of its own."""

    def __init__(self, folder: Path) -> None:
        """Open the folder as its only writer and continue behind the last record.

        Raises: CorruptLogError if a record is missing in the middle or the last segment is damaged.
            DataRootError if the folder cannot be made or written.
        """
        self.folder = make_private(folder)
        names = list_anew(folder)  # what an old listing leaves out would be written a second time
        for stray in names:  # of a killed predecessor; we are the only writer now
            if stray.startswith(TEMPORARY):
                (folder / stray).unlink(missing_ok=True)
        segments = segments_of(names)
        kept = chain(segments, 0)
        self.last = kept[-1].last if kept else 0
        if segments and segments[-1].last > self.last:
            raise CorruptLogError(
                missing(folder, self.last + 1, segments[-1]) + " Nothing was changed.", path=str(folder)
            )
        if kept:
            read_segment(folder, kept[-1])
        for small in sorted(set(segments) - set(kept)):  # a killed predecessor merged it and came no further
            read_segment(folder, next(s for s in kept if s.first <= small.first and small.last <= s.last))
            (folder / small.name).unlink(missing_ok=True)
        self._lock = threading.Lock()  # guards _sizes
        self._rewriting = threading.Lock()  # held while files are merged or compacted
        self._sizes = {s: (folder / s.name).stat().st_size for s in kept}  # in order
        self._appended = FANOUT  # since it was looked what could be merged
        self._merging: threading.Thread | None = None
        self._tell()

    def append(self, records: Sequence[Sequence[Buffer]]) -> int:
        """Publish encoded records (parts each) as the next segment; the number of the first. Durable on return.

        Raises: DataRootError; then none of the records is in the log, unless its `visible` is True. LeaseLostError if
            another process writes here.
        """
        segment = Segment(self.last + 1, self.last + len(records))
        parts = [part for record in records for part in record]
        try:
            write_segment(self.folder, segment, parts)
        except FileExistsError as error:
            raise LeaseLostError(
                f"{self.folder / segment.name} appeared although this process is the log's only writer: a second one "
                "runs, or ran a moment ago. This one stops writing and ends; nothing was lost.",
                path=str(self.folder),
            ) from error
        except DataRootError as error:
            if error.visible:  # type: ignore[attr-defined]
                self.last = segment.last  # readers may have seen them: the numbers are used up
            raise
        self.last = segment.last
        with self._lock:
            self._sizes[segment] = sum(map(len, parts))
        self._tell()
        self._merge_in_background()
        return segment.first

    def compact(self, through: int, keep_bytes: int, shrink: Callable[[Record], Record]) -> int:
        """Rewrite segments up to record `through`, oldest first, until all together take at most `keep_bytes`.

        Args: shrink: what is left of a record; its number stays.
        Returns: the last record that was rewritten, 0 if none was. Raises: DataRootError, CorruptLogError.
        """
        done = 0
        with self._rewriting:
            for segment in self._oldest_beyond(through, keep_bytes):
                records = read_segment(self.folder, segment)
                if records is None:
                    raise CorruptLogError(f"{self.folder / segment.name} vanished", path=str(self.folder))
                parts = [part for record in records for part in encode_parts(shrink(record))]
                replace_segment(self.folder, segment, parts)
                with self._lock:
                    self._sizes[segment] = sum(map(len, parts))
                done = segment.last
        return done

    def last_beyond(self, through: int, keep_bytes: int) -> int:
        """The last record that `compact` would rewrite now, 0 if none."""
        segments = self._oldest_beyond(through, keep_bytes)
        return segments[-1].last if segments else 0

    def _oldest_beyond(self, through: int, keep_bytes: int) -> list[Segment]:
        """The oldest segments up to record `through` without which the rest fits into `keep_bytes`, or all of them."""
        with self._lock:
            left = sum(self._sizes.values())
            chosen: list[Segment] = []
            for segment in self._sizes:
                if left <= keep_bytes or segment.last > through:
                    break
                left -= self._sizes[segment]
                chosen.append(segment)
            return chosen

    def close(self) -> None:
        """Wait for a merge under way."""
        if self._merging is not None:
            self._merging.join()

    def _merge_in_background(self) -> None:
        self._appended += 1
        if self._appended < FANOUT or (self._merging is not None and self._merging.is_alive()):
            return
        self._appended = 0
        if self._next_merge():
            self._merging = threading.Thread(target=self._merge_while_possible, name="log-merge", daemon=True)
            self._merging.start()

    def _next_merge(self) -> list[Segment]:
        with self._lock:
            return choose_merge(self._sizes)

    def _merge_while_possible(self) -> None:
        # No space, or a damaged file: the small files stay, they are just as good. Readers will report the damage.
        with contextlib.suppress(TinkerHpcError, FileExistsError):
            while True:  # one merge can complete the next class
                with self._rewriting:
                    chosen = self._next_merge()
                    if not chosen:
                        return
                    merged = merge(self.folder, chosen)
                    with self._lock:
                        size = sum(self._sizes.pop(s) for s in chosen)
                        self._sizes = dict(sorted([*self._sizes.items(), (merged, size)]))
                    self._tell()

    def _tell(self) -> None:
        with self._lock:
            latest = list(itertools.islice(reversed(self._sizes), MOST_NAMES))
            tell_names(self.folder, [segment.name for segment in reversed(latest)])


def choose_merge(sizes: dict[Segment, int]) -> list[Segment]:
    """Which neighbouring segments to merge now (an empty list: none), of all in order. Pure.

    The size class of a segment is the power of FANOUT that its number of records has reached; FANOUT neighbours of one
    class, together at most MERGE_BYTES, become one of the next class. So a record is rewritten once per class.
    """
    run: list[Segment] = []
    total = 0
    for segment, size in sizes.items():
        fits = (
            run
            and segment.first == run[-1].last + 1
            and _size_class(segment) == _size_class(run[0])
            and total + size <= MERGE_BYTES
        )
        if not fits:
            run, total = [], 0
        run.append(segment)
        total += size
        if len(run) == FANOUT:
            return run
    return []


def merge(folder: Path, chosen: Sequence[Segment]) -> Segment:
    """Replace neighbouring segments by one with the same records: the new one is durable before an old one goes."""
    merged = Segment(chosen[0].first, chosen[-1].last)
    parts: list[Buffer] = []
    for segment in chosen:
        records = read_segment(folder, segment)
        if records is None:
            raise CorruptLogError(f"{folder / segment.name} vanished", path=str(folder / segment.name))
        for record in records:
            parts.extend(encode_parts(record))
    write_segment(folder, merged, parts)
    for segment in chosen:
        (folder / segment.name).unlink(missing_ok=True)
    return merged


def _size_class(segment: Segment) -> int:
    size_class, reach = 0, FANOUT
    while len(segment) >= reach:
        size_class, reach = size_class + 1, reach * FANOUT
    return size_class
