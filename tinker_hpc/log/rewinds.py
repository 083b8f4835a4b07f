"""Requests that were taken back: a loop that was started again asked for something else from there on.

    workers/<k>/rewinds.json     [{"number", "seqs": [[first, last], ...], "reason", "at"}], replaced whole

Written by the gateway before it appends the `rewind` record, which only tells a running worker to look. Whoever reads
the logs from their beginning reads this first, and leaves those requests out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain

from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import WorkerFolder


@dataclass(frozen=True)
class Rewind:
    """One time that a loop left the recorded path. `seqs`: ranges of requests taken back, both ends included."""

    number: int
    seqs: list[list[int]]
    reason: str
    at: float


def read_rewinds(folder: WorkerFolder) -> list[Rewind]:
    """All of them, oldest first."""
    return [Rewind(**entry) for entry in read_json(folder.rewinds) or []]


def add_rewind(folder: WorkerFolder, seqs: Iterable[int], reason: str) -> Rewind:
    """Make one more durable. Raises: DataRootError."""
    known = read_rewinds(folder)
    rewind = Rewind(len(known) + 1, ranges(seqs), reason, time.time())
    write_json(folder.rewinds, [asdict(entry) for entry in [*known, rewind]])
    return rewind


def taken_back(rewinds: Iterable[Rewind]) -> frozenset[int]:
    """`seq` of every request that does not count."""
    return frozenset(chain.from_iterable(_numbers(rewind) for rewind in rewinds))


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """[first, last] of each run of consecutive numbers. Pure."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def _numbers(rewind: Rewind) -> Iterator[int]:
    for first, last in rewind.seqs:
        yield from range(first, last + 1)
