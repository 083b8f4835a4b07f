"""Puts a rank together: engine, steps, and on rank 0 lease, logs and desk; then the loop until `close`.

Step 5 of a request. Before: the gateway's request log. After: worker/desk.py, worker/loop.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_adapters.engine import TOKEN_BUDGET, Engine, Layout
from tinker_hpc.errors import ConfigError
from tinker_hpc.log import Bell, Lease, LogReader, Record, ResultLog, ResultReader
from tinker_hpc.log.looking import LAG_S
from tinker_hpc.log.request_log import compacted_through
from tinker_hpc.patience import until_written
from tinker_hpc.private_files import read_json
from tinker_hpc.run_folder import WorkerFolder
from tinker_hpc.worker.aside import SnapshotsAside
from tinker_hpc.worker.desk import Desk
from tinker_hpc.worker.hang import FLOOR_S, HangWatch
from tinker_hpc.worker.loop import Loop
from tinker_hpc.worker.metrics import MetricsFile
from tinker_hpc.worker.parting import Parting
from tinker_hpc.worker.poison import read_alone_notes, read_budget_notes, read_notes
from tinker_hpc.worker.publisher import Publisher
from tinker_hpc.worker.ranks import Ranks
from tinker_hpc.worker.recorded_experts import RecordedExperts
from tinker_hpc.worker.redo import Redo
from tinker_hpc.worker.rewinds import Rewinds
from tinker_hpc.worker.sample_step import SampleStep
from tinker_hpc.worker.snapshot_files import Snapshot
from tinker_hpc.worker.snapshot_step import SnapshotStep
from tinker_hpc.worker.snapshot_writer import SnapshotWriter, newest_good
from tinker_hpc.worker.train_step import TrainStep


def serve(folder: WorkerFolder, owner: dict[str, Any], parting: Parting) -> None:
    """Start the engine and serve the folder's requests until `close`.

    The lease is taken once the engine stands: until then a worker that still runs goes on.

    Args:
        owner: who takes the lease (agent.owner).
        parting: whether this rank is asked to end; armed here, once it takes requests.
    Raises: EndWorker or a TinkerHpcError if it cannot start or go on; Parted if it was asked to end.
    """
    declaration = until_written(lambda: read_json(folder.declaration))
    if declaration is None:
        raise ConfigError(f"{folder.declaration} does not exist: {folder.path} is not a worker's folder.")
    layout, dtype = _layout(declaration)
    token_budget = int((declaration.get("layout") or {}).get("token_budget") or TOKEN_BUDGET)
    folder_of_model = Path(declaration["base_model_folder"])
    recompute = bool((declaration.get("layout") or {}).get("recompute"))
    engine = Engine.start(folder_of_model, layout, dtype=dtype, token_budget=token_budget, recompute=recompute)
    in_place = not (engine.runtime.device.type == "cuda" and layout.computes_together)
    ranks = Ranks(engine.control_group, engine.global_rank, engine.world_size, in_place=in_place)
    hang = HangWatch(float(declaration.get("hang_floor_s") or FLOOR_S))
    engine.model.gets_on = hang.expect
    while _serve_once(folder, owner, declaration, engine, ranks=ranks, layout=layout, hang=hang, parting=parting):
        engine.forget()
    engine.stop()


def _serve_once(
    folder: WorkerFolder,
    owner: dict[str, Any],
    declaration: dict[str, Any],
    engine: Engine,
    *,
    ranks: Ranks,
    layout: Layout,
    hang: HangWatch,
    parting: Parting,
) -> bool:
    """From the newest good snapshot to `close` (False), or until the loop takes requests back (True): then the worker
    begins again as if it were a new one, with a lease of its own; only the base model stays.
    """
    rewinds = until_written(lambda: Rewinds(folder)) if ranks.is_first else None
    metrics = until_written(lambda: MetricsFile(folder.metrics, rewinds.seqs)) if rewinds else None
    aside = SnapshotsAside(folder.aside, engine, ranks)
    train_step = TrainStep(engine, ranks, declaration["base_model"], metrics, aside)
    if rewinds is not None:
        train_step.taken_back = rewinds.request_ids
    sample_step = SampleStep(engine, ranks, train_step)
    first = _FirstRank(folder, owner, declaration, rewinds) if rewinds else None
    snapshots = SnapshotStep(engine, layout, train_step, folder.snapshots, writer=first.writer if first else None)
    for record in ranks.broadcast(first.start_state() if first else None):
        snapshots.restore(Snapshot(**record.header))
    if rewinds is not None and rewinds.seqs:
        aside.keep_only(train_step.set_aside)
    parting.arm(first.wake if first else None)
    desk = first.desk(layout, snapshots, parting) if first else None
    again = Loop(folder.path, ranks, train_step, sample_step, snapshots, hang=hang, desk=desk).run()
    aside.close()
    if first is not None:
        first.close()
    return again


class _FirstRank:
    """What rank 0 alone has: the lease, both logs, what older workers left, and the writing of snapshots."""

    def __init__(
        self, folder: WorkerFolder, owner: dict[str, Any], declaration: dict[str, Any], rewinds: Rewinds
    ) -> None:
        self._folder = folder
        self._owner = owner
        self._rewinds = rewinds
        # A rank that was killed while the disk is full is started again there: it must not use up its restarts.
        self._lease = until_written(lambda: Lease.acquire(folder.lease, owner))
        log = until_written(lambda: ResultLog(folder.path, self._lease))
        self._redo = _redo(folder, log, rewinds.seqs)
        base_model = declaration["base_model"]
        self._started_from = self._find_snapshot(base_model, log.limits)
        if self._started_from is not None:
            self._redo.held = self._started_from[1].coverage
        self._bell = Bell(folder.path, side="worker")
        self._publisher = Publisher(log, self._bell)
        self.writer = until_written(
            lambda: SnapshotWriter(
                folder.snapshots,
                self._lease,
                self._publisher,
                base_model=base_model,
                started_from=self._started_from,
                interval_s=declaration.get("snapshot_interval_s"),
            )
        )

    def _find_snapshot(self, base_model: str, counted: Mapping[int, int]) -> tuple[str, Snapshot] | None:
        """The newest good one. Where the log was compacted there is one: wait until a lagging filesystem shows it."""
        compacted = compacted_through(self._folder.requests)
        deadline = time.monotonic() + LAG_S
        while True:
            void = self._rewinds.seqs
            found = newest_good(self._folder.snapshots, base_model=base_model, counted=counted, void=void)
            reaches = found is not None and found[1].position >= compacted
            if reaches or compacted == 0 or time.monotonic() > deadline:
                return found
            time.sleep(2.0)

    def start_state(self) -> list[Record]:
        """The snapshot every rank is to start from; none: from nothing."""
        return [Record(asdict(self._started_from[1]))] if self._started_from else []

    def wake(self) -> None:
        """Let the desk look up from waiting."""
        self._bell.wake()

    def desk(self, layout: Layout, snapshots: SnapshotStep, parting: Parting) -> Desk:
        """Say that this worker takes requests, and take them."""
        started = {"op": "worker_started", **self._owner, "layout": asdict(layout)}
        started |= {"num_redo_batches": len(self._redo.batches)}
        started |= {"snapshot": self._started_from[0] if self._started_from else None}
        self._publisher.publish(Record(started))
        return Desk(
            LogReader(self._folder.requests, written={"seq": "number"}),
            self._publisher,
            self._bell,
            lease=self._lease,
            redo=self._redo,
            poison=read_notes(self._folder.path),
            alone=read_alone_notes(self._folder.path),
            budgets=read_budget_notes(self._folder.path),
            snapshots=snapshots,
            rewinds=self._rewinds,
            parting=parting,
            recorded=RecordedExperts(self._folder.path),
        )

    def close(self) -> None:
        """Everything durable, all threads ended."""
        self.writer.close()
        self._publisher.close()
        self._bell.close()


def _layout(declaration: dict[str, Any]) -> tuple[Layout, str | None]:
    """Layout and dtype of worker.json; without any, all ranks share every matrix."""
    given = declaration.get("layout") or {}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dp_size, pp_size, ep_size = (int(given.get(name) or 1) for name in ("dp_size", "pp_size", "ep_size"))
    tp_size = int(given.get("tp_size") or world_size // (dp_size * pp_size))
    return Layout(tp_size, dp_size, pp_size, ep_size), given.get("dtype")


def _redo(folder: WorkerFolder, log: ResultLog, taken_back: frozenset[int]) -> Redo:
    """What older workers recorded. Our own lease is sealed on them, so all of it is there to be read."""
    redo, reader = Redo(taken_back=taken_back), ResultReader(folder.path)
    while True:
        records = until_written(reader.poll)
        redo.learn(records)
        if any(record.header["fence"] == log.lease.fence for record in records):
            return redo
        if not records:  # a shared filesystem that lags behind
            time.sleep(0.1)
