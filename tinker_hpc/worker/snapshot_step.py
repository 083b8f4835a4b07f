"""Taking a snapshot of the whole worker and starting from one, on all ranks.

Training stands still for as long as it takes to copy the adapters into rank 0's memory; then it goes on, while
snapshot_writer.py puts the copy on the disk. Sampling snapshots never change: each is copied and written once.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_adapters.engine import Engine, Layout
from tinker_hpc.worker.snapshot_files import Coverage, Snapshot
from tinker_hpc.worker.snapshot_writer import SnapshotWriter, Taken
from tinker_hpc.worker.train_step import TrainStep

Order = dict[str, Any]
"""What rank 0 tells the others of a snapshot that is to be taken: {"samplers": ids that are not on the disk yet}."""


class SnapshotStep:
    """`folder` is the worker's snapshots/; `writer` is rank 0's, None on the others."""

    def __init__(
        self, engine: Engine, layout: Layout, train_step: TrainStep, folder: Path, *, writer: SnapshotWriter | None
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._train_step = train_step
        self._folder = folder
        self._writer = writer

    def changed(self) -> None:
        """Something that a snapshot would hold is other than it was."""
        if self._writer is not None:
            self._writer.changed = True

    def take_notes(self) -> list[dict[str, Any]]:
        """On rank 0: what the snapshots finished since the last call cost, as headers for the result log."""
        assert self._writer is not None
        notes = self._writer.notes
        return [notes.pop(0) for _ in range(len(notes))]

    def order(self, *, parting: bool = False) -> Order | None:
        """On rank 0: whether the ranks should take a snapshot now, and what of it is to be copied.

        Args: parting: it is the last one: taken if anything changed since the one before, however costly.
        """
        assert self._writer is not None
        pending = any(adapter.has_gradients for adapter in self._engine.adapters.values())
        if parting:
            self._writer.settle()
        if not (self._writer.changed if parting else self._writer.is_due(pending_gradients=pending)):
            return None
        alive = [snapshot_id for snapshot_id in self._train_step.samplers.values() if snapshot_id is not None]
        return {"samplers": [snapshot_id for snapshot_id in alive if snapshot_id not in self._writer.samplers]}

    def settle(self) -> None:
        """On rank 0: wait until what was begun is on the disk, or has failed."""
        assert self._writer is not None
        self._writer.settle()

    def take(self, order: Order, coverage: Coverage | None) -> None:
        """Copy everything; rank 0, which knows the `coverage`, begins to write it.

        Collectives: Engine.copy_adapter of every adapter, then Engine.copy_snapshot of those in the order.
        """
        started = time.monotonic()
        adapters = {adapter_id: self._engine.copy_adapter(adapter_id) for adapter_id in self._engine.adapters}
        samplers = {snapshot_id: self._engine.copy_snapshot(snapshot_id) for snapshot_id in order["samplers"]}
        if self._writer is None:
            return
        assert coverage is not None
        state = self._train_step.state()
        alive = {snapshot_id for snapshot_id in self._train_step.samplers.values() if snapshot_id is not None}
        layout = asdict(self._layout)
        blocked_s = time.monotonic() - started
        self._writer.begin(Taken(coverage, state, layout, adapters, samplers, alive, blocked_s))

    def restore(self, snapshot: Snapshot) -> None:
        """Bring everything back, under the layout it was taken under or another.

        Raises: WeightsError. Collectives: none.
        """
        same_layout = snapshot.layout == asdict(self._layout)
        for adapter_id, folder in snapshot.adapters.items():
            self._engine.restore_adapter(adapter_id, self._folder / folder, same_layout=same_layout)
        for snapshot_id, folder in snapshot.samplers.items():
            self._engine.load_snapshot(snapshot_id, self._folder / folder)
        self._train_step.restore(snapshot.state)
