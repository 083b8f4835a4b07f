"""Rank 0's half of snapshots: when the next one is due, and the writing, in a thread of its own.

A snapshot gets its name only after every result of a request in it is durable: a worker started from it never computes
those requests again. And only while the lease is held: the numbers of a worker that lost it do not count.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adapters.engine import HostCopy
from tinker_hpc.errors import LeaseLostError, TinkerHpcError
from tinker_hpc.log import Lease
from tinker_hpc.patience import until_written
from tinker_hpc.private_files import make_private
from tinker_hpc.worker import snapshot_clock, snapshot_files
from tinker_hpc.worker.publisher import Publisher
from tinker_hpc.worker.snapshot_files import Coverage, Snapshot, SnapshotRefusedError

CLOSE_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Taken:
    """A snapshot in memory."""

    coverage: Coverage
    state: dict[str, Any]
    layout: dict[str, Any]
    adapters: Mapping[str, HostCopy]
    samplers: Mapping[str, HostCopy]
    """those not on the disk yet"""
    alive: set[str]
    """all sampling snapshots that a worker started from this one needs"""
    blocked_s: float
    """how long training stood still for it"""


class SnapshotWriter:
    """One thread writes, `begin` and the rest are called from rank 0's own."""

    def __init__(
        self,
        folder: Path,
        lease: Lease,
        publisher: Publisher,
        *,
        base_model: str,
        started_from: tuple[str, Snapshot] | None,
        interval_s: float | None = None,
    ) -> None:
        """Args:
        started_from: name and content of the snapshot this worker started from; it is kept.
        interval_s: between two snapshots; None: chosen from what they cost (snapshot_clock.py).
        """
        self.changed = False
        """Set by the caller: something happened since the last snapshot was begun."""
        self.samplers: dict[str, str] = dict(started_from[1].samplers) if started_from else {}
        """Sampling snapshots on the disk: folders relative to snapshots/."""
        self.notes: list[dict[str, Any]] = []
        """What each finished snapshot cost, to be logged; taken from the left by the caller."""
        self._folder = make_private(folder)
        make_private(folder / snapshot_files.SAMPLERS)
        self._lease = lease
        self._publisher = publisher
        self._base_model = base_model
        self._kept = [started_from] if started_from else []
        self._given_interval_s = interval_s
        self._interval_s = snapshot_clock.interval_s(None, None) if interval_s is None else interval_s
        self._last = self._asked = time.monotonic()
        self._write_s = 0.0
        self._number = 0
        self._thread: threading.Thread | None = None

    def is_due(self, *, pending_gradients: bool) -> bool:
        """Whether to take a snapshot now; never while the last one is still being written."""
        now = time.monotonic()
        lead_s, self._asked = now - self._asked + self._write_s, now  # the next batch may take as long as the last
        if self._thread is not None and self._thread.is_alive():
            return False
        return snapshot_clock.is_due(
            now - self._last,
            self._interval_s,
            changed=self.changed,
            pending_gradients=pending_gradients,
            lead_s=lead_s,
        )

    def begin(self, taken: Taken) -> None:
        """Write in the background."""
        self._last = time.monotonic()
        self.changed = False
        self._number += 1
        num_handed = self._publisher.num_handed  # results of everything in the snapshot are among them
        self._thread = threading.Thread(target=self._run, args=(taken, num_handed), name="snapshot", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until the snapshot under way is on the disk, or has failed."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Nothing will need the snapshot under way: give it a moment so that it leaves no half of itself."""
        if self._thread is not None:
            self._thread.join(CLOSE_PATIENCE_S)

    def _run(self, taken: Taken, num_handed: int) -> None:
        started = time.monotonic()
        name = snapshot_files.name_of(self._lease.fence, self._number)
        temporary = self._folder / f".writing-{name}"
        written: list[Path] = []
        try:
            snapshot = self._write(taken, name, temporary, written)
            self._publisher.wait_durable(num_handed)
            self._lease.check()
            snapshot_files.publish(temporary, self._folder / name, snapshot(num_handed))
        except Exception as error:
            for folder in [temporary, *written]:
                shutil.rmtree(folder, ignore_errors=True)
            self.changed = True
            if not isinstance(error, LeaseLostError):  # the desk finds that out by itself, and says it
                print(
                    f"worker: snapshot {name} could not be written ({error}). Training goes on; the next try is in "
                    f"{self._interval_s:.0f} s, and until then a restart redoes more of the log.",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self.samplers = snapshot(num_handed).samplers
        self._kept = [*self._kept, (name, snapshot(num_handed))][-snapshot_files.KEPT :]
        write_s = self._write_s = time.monotonic() - started
        if self._given_interval_s is None:
            self._interval_s = snapshot_clock.interval_s(taken.blocked_s, write_s)
        note = {"op": "snapshot", "name": name, "position": taken.coverage.position, "blocked_s": taken.blocked_s}
        self.notes.append(note | {"write_s": write_s, "interval_s": self._interval_s})
        try:
            snapshot_files.prune(self._folder, self._kept)
        except (OSError, TinkerHpcError) as error:
            print(f"worker: older snapshots stay for now: {error}", file=sys.stderr, flush=True)

    def _write(self, taken: Taken, name: str, temporary: Path, written: list[Path]) -> Callable[[int], Snapshot]:
        """All files but snapshot.json. Returns its content, but for the number of results."""
        shutil.rmtree(temporary, ignore_errors=True)
        make_private(make_private(temporary) / "adapters")
        adapters, files = {}, {}
        for index, (adapter_id, copy) in enumerate(taken.adapters.items()):
            adapters[adapter_id] = f"{name}/adapters/{index}"
            copy.write(make_private(temporary / "adapters" / str(index)))
        found = snapshot_files.checksums(temporary, temporary)
        files |= {f"{name}/{file}": digest for file, digest in found.items()}
        samplers = {key: folder for key, folder in self.samplers.items() if key in taken.alive}
        for index, (snapshot_id, copy) in enumerate(taken.samplers.items()):
            folder = self._folder / snapshot_files.SAMPLERS / f"{name}-{index}"
            written.append(folder)
            copy.write(make_private(folder))
            samplers[snapshot_id] = f"{snapshot_files.SAMPLERS}/{folder.name}"
            files |= snapshot_files.checksums(self._folder, folder)
        if self._kept:
            shared = {file for file in self._kept[-1][1].files if file.rpartition("/")[0] in samplers.values()}
            files |= {file: self._kept[-1][1].files[file] for file in shared}

        def snapshot(num_handed: int) -> Snapshot:
            return Snapshot(
                position=taken.coverage.position,
                open=sorted(taken.coverage.open),
                fence=self._lease.fence,
                num_results=1 + num_handed,  # the log's first record is its seal
                base_model=self._base_model,
                layout=taken.layout,
                state=taken.state,
                adapters=adapters,
                samplers=samplers,
                created_at=time.time(),
                files=files,
            )

        return snapshot


def newest_good(
    folder: Path, *, base_model: str, counted: Mapping[int, int], void: frozenset[int] = frozenset()
) -> tuple[str, Snapshot] | None:
    """The snapshot to start from, saying on stderr why newer ones were passed over. None: from the log's beginning."""
    for name in reversed(until_written(lambda: snapshot_files.names(folder))):
        try:
            return name, snapshot_files.read(folder / name, base_model=base_model, counted=counted, void=void)
        except SnapshotRefusedError as error:
            print(f"worker: snapshot {folder / name} is not used: {error}.", file=sys.stderr, flush=True)
    return None
