"""Requests that broke one rank and not the others.

Such a failure ends all ranks, since their states differ, and the restarted ranks would meet the same request again.
So the rank that it broke leaves a note, and rank 0 of the restarted worker answers it without running it. A rank that
is killed leaves none: its request is run again.

Where several passes were run together, each of them is first run alone; the one that breaks a rank then has its note.

    <worker folder>/poison/<seq>.json        {"category", "message"}, written once by the rank that failed
    <worker folder>/poison/<seq>.alone.json  {}: not to be mixed with others
    <worker folder>/poison/<seq>.budget.json {"token_budget"}: to be run in smaller micro-batches, for want of memory;
                                             of a sample: so many sequences at a time
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tinker_hpc.log import Record
from tinker_hpc.private_files import make_private, read_json, write_json
from tinker_hpc.worker.ranks import Failure


def leave_note(worker_folder: Path, requests: Iterable[Record], failure: Failure) -> None:
    """Say that these must not be run again. Raises: DataRootError if the disk refuses."""
    folder = make_private(worker_folder / "poison")
    for request in requests:
        note = {"category": failure.category, "message": failure.message}
        write_json(folder / f"{request.header['seq']}.json", note)


def leave_alone_notes(worker_folder: Path, requests: Iterable[Record]) -> None:
    """Say that one of these broke a rank, so that each is to be run by itself. Raises: DataRootError."""
    folder = make_private(worker_folder / "poison")
    for request in requests:
        write_json(folder / f"{request.header['seq']}.alone.json", {})


def leave_budget_notes(worker_folder: Path, requests: Iterable[Record], token_budget: int) -> None:
    """Say that these did not fit into one rank's memory. Raises: DataRootError."""
    folder = make_private(worker_folder / "poison")
    for request in requests:
        write_json(folder / f"{request.header['seq']}.budget.json", {"token_budget": token_budget})


def read_budget_notes(worker_folder: Path) -> dict[int, int]:
    """Most tokens of a micro-batch, or sequences at a time, by `seq` of the request."""
    notes = {}
    for path in (worker_folder / "poison").glob("[0-9]*.budget.json"):
        note = read_json(path)
        if note is not None:
            notes[int(path.name.split(".")[0])] = int(note["token_budget"])
    return notes


def read_alone_notes(worker_folder: Path) -> set[int]:
    """The `seq` of each request that is not to be mixed with others."""
    return {int(path.name.split(".")[0]) for path in (worker_folder / "poison").glob("[0-9]*.alone.json")}


def read_notes(worker_folder: Path) -> dict[int, Failure]:
    """Failures by `seq` of the request."""
    notes = {}
    for path in (worker_folder / "poison").glob("[0-9]*.json"):
        if not path.stem.isdigit():
            continue
        note = read_json(path)
        if note is not None:
            notes[int(path.stem)] = Failure(**note)
    return notes
