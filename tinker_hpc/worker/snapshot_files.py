"""Snapshots of a worker on disk: complete or absent, checked before they are believed, the two newest kept.

    snapshots/
      <fence>-<number>/snapshot.json      what the log says up to here is in it; sha256 of every file it needs
      <fence>-<number>/adapters/<i>/...   adapter_files.py, optimizer and pending gradients included
      samplers/<fence>-<number>/...       one in-memory sampler's weights: immutable, so written once and shared
      needed.json                         which requests the older of the two kept ones would still have to redo
      .writing-.../                       being written, or left by a killed worker

Only the worker that holds the lease writes here, from one thread. A folder's name sorts as it was taken.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.log.looking import list_anew, list_names
from tinker_hpc.private_files import fsync_folder, make_private, read_json, write_json
from tinker_hpc.worker.checkpoint import sha256

METADATA = "snapshot.json"
NEEDED = "needed.json"
SAMPLERS = "samplers"
KEPT = 2
"""The newest, and one more in case the newest is damaged when it is needed."""
FORMAT = 1
_NAME = re.compile(r"(\d{8,})-(\d{6,})")


class SnapshotRefusedError(TinkerHpcError, ValueError):
    """A snapshot cannot be started from; the message says why. The next older one may do."""


@dataclass(frozen=True)
class Coverage:
    """Which requests' effects a state holds: all up to `position` but those in `open`."""

    position: int = 0
    """`seq` of the last request that was read from the log"""
    open: frozenset[int] = frozenset()
    """read and not finished"""

    def __contains__(self, seq: int) -> bool:
        return seq <= self.position and seq not in self.open


@dataclass(frozen=True)
class Snapshot:
    """The contents of snapshot.json."""

    position: int
    open: list[int]
    fence: int
    num_results: int
    """How many records the result log of that fence must count: those of every request in here are among them."""
    base_model: str
    layout: dict[str, Any]
    state: dict[str, Any]
    """TrainStep.state()"""
    adapters: dict[str, str]
    """model_id -> folder, relative to snapshots/"""
    samplers: dict[str, str]
    """snapshot_id -> folder, relative to snapshots/"""
    created_at: float
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{path relative to snapshots/: {"sha256": hex, "bytes": n}}"""
    format: int = FORMAT

    @property
    def coverage(self) -> Coverage:
        return Coverage(self.position, frozenset(self.open))


def names(folder: Path) -> list[str]:
    """Complete snapshots, oldest first, as they are now. Raises: DataRootError."""
    found = list_anew(folder) if folder.exists() else list_names(folder)
    return sorted(name for name in found if _NAME.fullmatch(name))


def name_of(fence: int, number: int) -> str:
    return f"{fence:08d}-{number:06d}"


def checksums(root: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Make every file below `folder` durable and private, and say what is in it, by its path relative to `root`."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        os.chmod(file, 0o600)
        digest = sha256(file, sync=True)
        found[str(file.relative_to(root))] = {"sha256": digest, "bytes": file.stat().st_size}
    for part in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        fsync_folder(part)
    return found


def publish(temporary: Path, final: Path, snapshot: Snapshot) -> None:
    """Add snapshot.json and give the folder its name; durable on return. Raises: OSError."""
    write_json(temporary / METADATA, asdict(snapshot))
    os.rename(temporary, final)
    fsync_folder(final.parent)


def read(path: Path, *, base_model: str, counted: Mapping[int, int], void: Iterable[int] = ()) -> Snapshot:
    """The snapshot in `path`, every file checked.

    Args:
        counted: how many records of each older fence's result log count (ResultLog.limits).
        void: requests that were taken back: a state that holds one of them is of no use.
    Raises: SnapshotRefusedError.
    """
    try:
        content = read_json(path / METADATA)
    except (OSError, ValueError) as error:
        raise SnapshotRefusedError(f"{path / METADATA} cannot be read: {error}") from error
    if content is None:
        raise SnapshotRefusedError(f"{path / METADATA} is missing")
    if content.get("format") != FORMAT:
        raise SnapshotRefusedError(f"it has format {content.get('format')}, this version reads {FORMAT}")
    snapshot = Snapshot(**content)
    if snapshot.base_model != base_model:
        raise SnapshotRefusedError(f"it is of base model {snapshot.base_model}, this worker serves {base_model}")
    if counted.get(snapshot.fence, 0) < snapshot.num_results:
        raise SnapshotRefusedError(
            f"it was taken by worker lease {snapshot.fence} after that lease was lost ({snapshot.num_results} of its "
            f"results are in it, {counted.get(snapshot.fence, 0)} count)"
        )
    coverage = snapshot.coverage
    taken_back = [seq for seq in void if seq in coverage]
    if taken_back:
        raise SnapshotRefusedError(f"request {taken_back[0]}, which is in it, was taken back by the loop since")
    for name, expected in snapshot.files.items():
        file = path.parent / name
        try:
            good = file.stat().st_size == expected["bytes"] and sha256(file) == expected["sha256"]
        except OSError as error:
            raise SnapshotRefusedError(f"{file} cannot be read: {error.strerror}") from error
        if not good:
            raise SnapshotRefusedError(f"{file} fails its checksum")
    return snapshot


def prune(folder: Path, kept: Sequence[tuple[str, Snapshot]]) -> None:
    """Say what the oldest kept one needs, then remove everything that no kept one refers to. Errors are let pass:
    what could not be removed goes the next time.

    Raises: DataRootError if needed.json cannot be written; nothing was removed then.
    """
    if len(kept) == KEPT:
        oldest = min(kept, key=lambda entry: entry[0])[1]
        write_json(folder / NEEDED, {"position": oldest.position, "open": oldest.open})
    samplers = {Path(path).name for _, snapshot in kept for path in snapshot.samplers.values()}
    for entry in os.listdir(folder):
        if entry not in {name for name, _ in kept} and (entry.startswith(".writing-") or _NAME.fullmatch(entry)):
            shutil.rmtree(folder / entry, ignore_errors=True)
    for entry in os.listdir(make_private(folder / SAMPLERS)):
        if entry not in samplers:
            shutil.rmtree(folder / SAMPLERS / entry, ignore_errors=True)
