"""Immutable files of records in one folder, found by their names alone.

    seg-<first>-<last>      records number first..last (from 1, without gaps), then a footer with count, length, crc32
    contents                the names of the segments, for readers on other nodes (looking.py)
    .tmp-...                being written, or left by a killed writer: never read

Rules that hold on NFS and Lustre as well: a file is written under a temporary name, fsynced, and then *linked* to its
name, which fails if the name exists (a second writer cannot overwrite an acknowledged record, as a rename would); the
folder is fsynced; readers list the folder afresh, open afresh, and believe numbers in names, never mtimes or sizes.
A number that no name covers is not there *yet*. Writers merge many small files into one bigger one: the big one appears
before the small ones vanish, so a reader meets overlaps and files that disappear, and no gap.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinker_hpc.errors import CorruptLogError, DataRootError
from tinker_hpc.log.looking import TEMPORARY, list_names, names_told
from tinker_hpc.log.record import Buffer, Record, decode_all
from tinker_hpc.private_files import PRIVATE_FILE, fsync_folder, write_bytes

FOOTER_MAGIC = b"TKHPCEND"
_FOOTER = struct.Struct("<8sQQQII")  # magic, first, last, bytes before the footer, zero, crc32 of what precedes it here
_NAME = re.compile(r"seg-(\d{12,})-(\d{12,})")
_MAX_IOV = 1000
RETRY_S = 2.0


@dataclass(frozen=True, order=True)
class Segment:
    """Records `first`..`last`, as a file's name says."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"seg-{self.first:012d}-{self.last:012d}"

    def __len__(self) -> int:
        return self.last - self.first + 1


def list_segments(folder: Path, after: int = 0) -> list[Segment]:
    """The segments in `folder` that hold records behind `after`, listed and told, sorted. A folder that does not exist
    yet has none.

    Raises: DataRootError if it cannot be listed.
    """
    return segments_of([*list_names(folder), *names_told(folder)], after)


def segments_of(names: Iterable[str], after: int = 0) -> list[Segment]:
    """Those that are a segment's names and hold records behind `after`, sorted, each once. Pure.

    A long run has thousands of names that its readers know: those are told by their text alone.
    """
    usual, known = len(Segment(0, 0).name), f"{after:012d}"
    found = map(_NAME.fullmatch, (name for name in names if len(name) != usual or name[-12:] > known))
    return sorted({Segment(int(m[1]), int(m[2])) for m in found if m and int(m[2]) > after})


def outermost(segments: Iterable[Segment]) -> list[Segment]:
    """Without those inside of another one, which were merged: both ends rise from each to the next. Pure."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: (segment.first, -segment.last)):
        if not kept or segment.last > kept[-1].last:
            kept.append(segment)
    return kept


def chain(segments: Iterable[Segment], after: int) -> list[Segment]:
    """The fewest segments that hold the records behind `after`, up to the first number that none holds. Pure."""
    ordered = sorted(segments)
    chosen: list[Segment] = []
    index, reached = 0, after
    while True:
        best = None
        while index < len(ordered) and ordered[index].first <= reached + 1:
            best = ordered[index] if best is None or ordered[index].last > best.last else best
            index += 1
        if best is None or best.last <= reached:
            return chosen
        chosen.append(best)
        reached = best.last


def last_contiguous(segments: Iterable[Segment]) -> int:
    """The largest n so that 1..n are all covered; 0 for an empty folder."""
    chosen = chain(segments, 0)
    return chosen[-1].last if chosen else 0


def missing(folder: Path, number: int, later: Segment | None) -> str:
    """What to say of a record that ought to be there and is not."""
    why = f"although later ones are there ({later.name})" if later else "although it was told that it is there"
    return (
        f"{folder}: record {number} is missing {why}. Did a purge of old files remove it? Bring the file back from a "
        "snapshot of the filesystem, and keep the data root where nothing is purged while runs go on."
    )


def write_segment(folder: Path, segment: Segment, parts: Sequence[Buffer]) -> None:
    """Publish encoded records as one segment; durable on return.

    Raises: DataRootError if the filesystem refuses (full, over quota, read-only) or another writer was there first.
        Its attribute `visible` is True in the one case where the records are there although an error is raised: the
        name was made but the folder could not be synced.
    """
    publish(folder, segment.name, [*parts, _footer(segment, parts)])


def replace_segment(folder: Path, segment: Segment, parts: Sequence[Buffer]) -> None:
    """Put other bytes under a segment's name, for its one writer alone. A reader sees the old or the new ones.

    Raises: DataRootError; the old ones are then still there.
    """
    write_bytes(folder / segment.name, b"".join([*parts, _footer(segment, parts)]))


def _footer(segment: Segment, parts: Sequence[Buffer]) -> bytes:
    footer = struct.pack("<8sQQQI", FOOTER_MAGIC, segment.first, segment.last, sum(map(len, parts)), 0)
    return footer + struct.pack("<I", zlib.crc32(footer))


def publish(folder: Path, name: str, parts: Sequence[Buffer]) -> None:
    """Make the file `folder/name` with these bytes: all of it or nothing, never over an existing one, durable.

    Raises: FileExistsError if the name is taken; DataRootError as `write_segment`.
    """
    temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    visible = False
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
            try:
                _write_all(descriptor, parts)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _name_it(temporary, folder / name)
            visible = True
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(folder)
    except FileExistsError:
        raise
    except OSError as error:
        raise DataRootError(
            f"cannot write {folder / name}: {error.strerror or error}. Nothing was lost; free some space or quota "
            "under the data root (or mend its permissions), then try again.",
            path=str(folder / name),
            visible=visible,
        ) from error


def read_segment(folder: Path, segment: Segment, *, retry_s: float = RETRY_S) -> list[Record] | None:
    """The records of a published segment, checked; None if the file is gone (merged away, or not visible here yet).

    Raises: CorruptLogError naming the file and the offset, after `retry_s` seconds of trying again: a lagging
        filesystem may show a name before all its bytes.
    """
    path = folder / segment.name
    deadline = time.monotonic() + retry_s
    while True:
        try:
            return _parse(_read_own(path), segment, str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: removed while open
                return None
            raise DataRootError(
                f"cannot read {path}: {error.strerror}. Check the permissions and the mount."
            ) from error
        except CorruptLogError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(min(0.1, retry_s))


def _read_own(path: Path) -> bytes:
    """The bytes of a file that belongs to whom the folder belongs. Raises: CorruptLogError for anybody else's."""
    with path.open("rb") as file:
        owner, expected = os.fstat(file.fileno()).st_uid, path.parent.stat().st_uid
        if owner != expected:
            raise CorruptLogError(
                f"{path} belongs to uid {owner}, the log to uid {expected}. Somebody else put it there; it is not "
                "believed. Remove it, and look who can write under the data root.",
                path=str(path),
            )
        return file.read()


def _parse(data: bytes, segment: Segment, where: str) -> list[Record]:
    def corrupt(what: str, offset: int) -> CorruptLogError:
        return CorruptLogError(f"{where} is corrupt at byte {offset}: {what}", path=where, offset=offset)

    end = len(data) - _FOOTER.size
    # Frames first: their checksums point at the byte range that is wrong, the footer only says that something is.
    good_footer = end >= 0 and data[end : end + 8] == FOOTER_MAGIC
    records = list(decode_all(data, where=where, end=end if good_footer else None))
    if not good_footer:
        raise corrupt("the footer is missing; the file was cut short", len(data))
    _, first, last, length, _, checksum = _FOOTER.unpack_from(data, end)
    if zlib.crc32(data[end : end + _FOOTER.size - 4]) != checksum:
        raise corrupt("the footer fails its checksum", end)
    if (first, last, length, len(records)) != (segment.first, segment.last, end, len(segment)):
        raise corrupt(
            f"the name says records {segment.first}-{segment.last}, the footer says {first}-{last} in {length} bytes, "
            f"and {len(records)} records in {end} bytes are there",
            end,
        )
    return records


def _write_all(descriptor: int, parts: Sequence[Buffer]) -> None:
    pending = [memoryview(part).cast("B") for part in parts if len(part)]
    while pending:
        written = os.writev(descriptor, pending[:_MAX_IOV])
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]


def _name_it(temporary: Path, final: Path) -> None:
    """Give the finished file its name, refusing to replace another."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        # An NFS server that lost its answer repeats the call: then it is our own file that exists.
        if not os.path.samefile(temporary, final):
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if final.exists():  # a filesystem without hard links: the best there is
            raise FileExistsError(errno.EEXIST, "File exists", str(final)) from error
        os.rename(temporary, final)
