"""Step 5 of a request. Before: worker/desk.py on rank 0. After: worker/train_step.py, worker/sample_step.py.

The same loop on every rank: rank 0 broadcasts what its desk decided, all ranks do it, rank 0 answers.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tinker_hpc.log import Record
from tinker_hpc.worker.desk import Desk
from tinker_hpc.worker.poison import leave_note
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks, describe
from tinker_hpc.worker.sample_step import SampleStep
from tinker_hpc.worker.snapshot_step import Order, SnapshotStep
from tinker_hpc.worker.train_step import Answer, TrainStep


class Loop:
    """Runs until `close`. `folder` is the worker's; `desk` is rank 0's, None on the others."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        train_step: TrainStep,
        sample_step: SampleStep,
        snapshots: SnapshotStep,
        *,
        desk: Desk | None,
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._train_step = train_step
        self._sample_step = sample_step
        self._snapshots = snapshots
        self._desk = desk

    def run(self) -> None:
        """Returns after `close`, everything answered and durable.

        Raises: EndWorker if this worker cannot go on: lease lost, logs damaged, ranks of different states.
        Collectives: per batch one Ranks.broadcast, those of its steps, and one Ranks.agree per request.
        """
        while True:
            orders = self._ranks.broadcast(self._desk.next_orders() if self._desk else None)
            if not orders:
                continue
            command, requests = orders[0].header["command"], orders[1:]
            if command == "close":
                return
            self._train_step.touch(orders[0].header["touched"])
            self._take_snapshot(orders[0].header["snapshot"])
            if command == "idle":
                continue
            if command == "train":
                self._train(requests)
            else:
                if self._desk:
                    self._desk.sampling_starts()
                self._sample_step.run(requests, self._finish, self._admit, self._break_off)

    def _admit(self) -> tuple[Sequence[Record], Sequence[int]]:
        """Called between decode steps: samples that join, and the seqs of those that nobody wants any more.

        A training batch whose turn it is runs in here.
        """
        orders = self._ranks.broadcast(self._desk.orders_while_sampling() if self._desk else None)
        if not orders:
            return [], []
        self._take_snapshot(orders[0].header["snapshot"])
        num_samples = orders[0].header["num_samples"]
        training = orders[1 + num_samples :]
        if training:
            started = time.monotonic()
            self._train(training)
            if self._desk:
                self._desk.training_done(time.monotonic() - started)
        return orders[1 : 1 + num_samples], orders[0].header["cancelled"]

    def _take_snapshot(self, order: Order | None) -> None:
        if order is not None:
            self._snapshots.take(order, self._desk.coverage() if self._desk else None)

    def _train(self, requests: Sequence[Record]) -> None:
        for request in requests:
            started = time.monotonic()
            try:
                outcome = self._run_one(request)
            except EndWorker as apart:
                self._break_off([request], apart)
                raise
            self._finish(request, outcome, seconds=time.monotonic() - started)

    def _run_one(self, request: Record) -> Answer | Failure:
        answer: Answer = ({}, {})
        failure = None
        try:
            answer = self._train_step.run(request)
        except Exception as error:
            failure = describe(error)
            if failure.category == "server":
                print(f"worker: request {request.header['seq']} ({request.header['op']}) failed:", file=sys.stderr)
                traceback.print_exc()
        return self._ranks.agree(failure) or answer

    def _break_off(self, requests: Sequence[Record], apart: EndWorker) -> None:
        """The ranks parted over these requests and all will start again: see to it that they are not tried again."""
        if apart.failure is None:
            return
        if self._desk is None:
            leave_note(self._folder, requests, apart.failure)
            return
        for request in requests:
            self._desk.finish(request, apart.failure)
        self._desk.flush()

    def _finish(self, request: Record, outcome: Answer | Failure, seconds: float | None = None) -> None:
        if self._desk:
            self._desk.finish(request, outcome, seconds=seconds)
