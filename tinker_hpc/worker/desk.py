"""Step 5 of a request. Before: log/request_log.py. After: worker/loop.py on all ranks.

Rank 0's desk: reads requests, decides what runs next, and hands results to the publisher. The other ranks have none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tinker_hpc.log import Bell, Lease, LogReader, Record
from tinker_hpc.log.looking import LAG_S
from tinker_hpc.patience import until_written
from tinker_hpc.worker.batch import train_groups
from tinker_hpc.worker.parting import Parting
from tinker_hpc.worker.publisher import Publisher
from tinker_hpc.worker.ranks import EndWorker, Failure
from tinker_hpc.worker.recorded_experts import RecordedExperts
from tinker_hpc.worker.redo import Redo
from tinker_hpc.worker.rewinds import Rewinds
from tinker_hpc.worker.schedule import Batch, Refusal, Schedule
from tinker_hpc.worker.snapshot_files import Coverage
from tinker_hpc.worker.snapshot_step import Order, SnapshotStep
from tinker_hpc.worker.train_step import Answer

SIGN_OF_LIFE_S = 5.0
"""An idle rank 0 tells the others so this often, and looks whether the lease is still its own."""
READ_BYTES = 64 << 20
BACKLOG_BYTES = 256 << 20
"""Read no further while this much waits to run: a long log is redone in pieces."""
POLL_WHILE_SAMPLING_S = 0.02
"""Look for new requests this often between decode steps."""
MIN_SLICE_S = 0.05
MAX_SLICE_S = 5.0
"""Sampling goes on for as long as the last training batch took, within these bounds, before the next one cuts in."""
T = TypeVar("T")
Orders = list[Record]
"""A command record and the requests it is about; empty: nothing to do, a sign of life."""


class Desk:
    """Everything rank 0 does beside computing. Errors that end the worker are raised as EndWorker."""

    def __init__(
        self,
        requests: LogReader,
        publisher: Publisher,
        bell: Bell,
        *,
        lease: Lease,
        redo: Redo,
        poison: Mapping[int, Failure],
        alone: Collection[int],
        budgets: Mapping[int, int],
        snapshots: SnapshotStep,
        rewinds: Rewinds,
        parting: Parting,
        recorded: RecordedExperts,
    ) -> None:
        """poison: requests not to be run, by seq; alone: passes not to be mixed with others; budgets: passes
        to be cut into smaller micro-batches (poison.py).
        """
        self._requests = requests
        self._publisher = publisher
        self._bell = bell
        self._lease = lease
        self._redo = redo
        self._poison = poison
        self._alone = alone
        self._budgets = budgets
        self._snapshots = snapshots
        self._rewinds = rewinds
        self._parting = parting
        self._recorded = recorded
        self._rewound = False
        self._open: set[int] = set()  # read from the log and not finished
        self._schedule = Schedule()
        self._backlog = 0
        self._num_redone = 0  # requests that were answered before and are computed again
        self._redo_began = time.monotonic() if redo.batches else None
        self._lost: dict[str, str] = {}  # models and samplers that could not be brought back, and why
        self._touched: list[str] = []
        self._sampling: dict[str, int] = {}  # samples under way: their seq by request id
        self._slice_started = self._last_poll = time.monotonic()
        self._slice_s = MIN_SLICE_S

    # ---- what to do next

    def next_orders(self) -> Orders:
        """Wait for work: a batch, nothing after SIGN_OF_LIFE_S, `close` at the end of the log, `rewind`: the loop
        took requests back, and all ranks must go back to their state before them; or `part` (parting.py).
        """
        deadline = time.monotonic() + SIGN_OF_LIFE_S
        while True:
            self._check()
            if self._parting.asked:
                return self._orders("part", (), None if self._rewound else self._snapshots.order(parting=True))
            if self._backlog < BACKLOG_BYTES:
                self._read()
            if not self._redo.batches:
                self._take_cancelled()
            batch = self._next_redo() if self._redo.batches else self._next_new()
            if self._rewound:
                return [Record({"command": "rewind"})]
            snapshot = self._snapshots.order()
            if batch is not None:
                return self._orders(batch.kind, batch.requests, snapshot, batch.groups)
            if snapshot is not None:
                return self._orders("idle", (), snapshot)
            if self._read():  # over the backlog's limit, and yet nothing can run: a gap is to be closed
                continue
            if self._schedule.closing and not self._redo.batches:
                for refusal in self._schedule.abandon():
                    self._refuse(refusal)
                self.flush()
                return [Record({"command": "close"})]
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._guard(lambda: until_written(self._lease.check))
                return []
            self._bell.wait(left_s)

    def orders_while_sampling(self) -> Orders:
        """Between two decode steps: samples that join, and a training batch when it is its turn. Never waits."""
        if self._parting.asked:  # what is being sampled is begun anew by the next worker
            return self._orders("part", (), None if self._rewound else self._snapshots.order(parting=True))
        now = time.monotonic()
        if now - self._last_poll < POLL_WHILE_SAMPLING_S and not self._schedule.training_waits():
            return []
        if now - self._last_poll >= POLL_WHILE_SAMPLING_S:
            self._last_poll = now
            self._check()
            self._read()
        if self._redo.batches or self._rewound:
            return []  # the next recorded batch comes when this one is done, as it did then
        cancelled = self._take_cancelled()
        training = None
        if now - self._slice_started >= self._slice_s:
            training = self._next_new(sampling=False)
        samples = self._runnable(self._schedule.take_samples())
        snapshot = self._snapshots.order()
        if not samples and training is None and snapshot is None and not cancelled:
            return []
        joined = [*samples, *(training.requests if training else ())]
        for requests in (samples, training.requests if training else ()):
            if requests:
                self._record_batch(requests)
        self._note_sampling(samples)
        order = {"command": "join", "num_samples": len(samples), "snapshot": snapshot, "cancelled": cancelled}
        return [Record({**order, **self._how(joined)}), *map(self._complete, joined)]

    def coverage(self) -> Coverage:
        """What the state of this moment, between two batches, holds."""
        return Coverage(self._requests.position, frozenset(self._open))

    def sampling_starts(self) -> None:
        """The slice after which training may cut in begins now."""
        self._slice_started = time.monotonic()

    def training_done(self, seconds: float) -> None:
        """A training batch took this long: sampling may take as long before the next."""
        self._slice_s = min(MAX_SLICE_S, max(MIN_SLICE_S, seconds))
        self._slice_started = time.monotonic()

    # ---- results

    def finish(self, request: Record, outcome: Answer | Failure, *, seconds: float | None = None) -> None:
        """Answer a request, unless it was answered before (redo), and release what waited for it."""
        self._open.discard(request.header["seq"])
        if request.header["op"] != "sample":
            self._snapshots.changed()
        self._sampling.pop(str(request.header.get("request_id")), None)
        answered = self._redo.is_answered(request)
        lost = self._lost.get(_needed(request))
        if lost is None and answered:
            reason = self._difference(request, outcome)
            lost = None if reason is None else self._lose(request, reason)
        if lost is not None:
            self._end_lost(request, lost)
            return
        failure = outcome if isinstance(outcome, Failure) else None
        if not answered:
            fields, arrays = ({}, {}) if isinstance(outcome, Failure) else outcome
            if seconds is not None:
                fields = {**fields, "compute_s": seconds}
            self._answer(request, failure, fields, dict(arrays))
        for refusal in self._schedule.finish(request, error=failure.message if failure else None):
            self._refuse(refusal)

    def flush(self) -> None:
        """Wait until every result is durable."""
        self._guard(self._publisher.flush)

    def part(self) -> None:
        """Wait until every result and the last snapshot are on the disk."""
        self._snapshots.settle()
        self._check()
        self.flush()
        print("worker: asked to end; everything is on the disk.", file=sys.stderr, flush=True)

    # ---- inside

    def _read(self) -> bool:
        """Take in what is new in the log; whether there was anything."""
        if self._rewound:
            return False
        new = self._guard(lambda: until_written(lambda: self._requests.poll(READ_BYTES)))
        for request in new:
            if request.header["op"] == "rewind":
                if self._rewinds.is_known(request.header["number"]):
                    continue
                self._rewound = True
                return True  # what follows goes on from another past
            if self._rewinds.takes_back(request):
                self._schedule.ignore(request.header["request_id"])
                continue
            if self._schedule.knows(request):
                continue
            if request.header["op"] == "cancel" and not self._redo.is_answered(request):
                self._answer(request, None, {}, {})
            if request.header["op"] not in ("cancel", "rejected", "close"):  # these never wait to run
                self._backlog += _size(request)
                self._open.add(request.header["seq"])
            for refusal in self._schedule.add(request):
                self._refuse(refusal)
        return bool(new)

    def _take_cancelled(self) -> list[int]:
        """Answer the samples that were cancelled before they ran. Returns the seqs of those under way."""
        refusals, others = self._schedule.take_cancelled()
        for refusal in refusals:
            self._refuse(refusal)
        return [self._sampling[request_id] for request_id in others if request_id in self._sampling]

    def _note_sampling(self, requests: Sequence[Record]) -> None:
        self._sampling |= {str(r.header.get("request_id")): r.header["seq"] for r in requests}

    def _next_new(self, *, sampling: bool = True) -> Batch | None:
        """The schedule's next batch, without what was answered before and has no effect."""
        while (batch := self._schedule.next_batch(sampling=sampling)) is not None:
            requests = self._runnable(batch.requests)
            if requests:
                return Batch(batch.kind, tuple(requests))
        return None

    def _next_redo(self) -> Batch | None:
        """The next recorded batch, without what was answered before and has no effect; None when all are done."""
        deadline = time.monotonic() + LAG_S
        while self._redo.batches and not self._rewound:
            requests = self._schedule.take(self._redo.batches[0])
            if requests is None:
                if not self._read():
                    if self._rewinds.seqs and self._requests.position >= max(self._rewinds.seqs):
                        # What came before these was taken back and asked again: they run behind it, in log order.
                        self._redo.batches.popleft()
                        continue
                    if time.monotonic() > deadline:
                        seqs = self._redo.batches[0]
                        raise EndWorker(f"the result log speaks of requests {seqs}, the request log does not have them")
                    time.sleep(0.1)
                continue
            self._redo.batches.popleft()
            groups = train_groups(requests, self._alone_of(requests))  # as it was cut then, with those that end here
            runnable = self._runnable(requests, also=self._redo.together_with_new(groups))
            self._num_redone += sum(self._redo.is_answered(request) for request in runnable)
            if not self._redo.batches:
                self._say_redone()
            if runnable:
                kind = "sample" if runnable[0].header["op"] == "sample" else "train"
                return Batch(kind, tuple(runnable), groups=tuple(groups))
        if self._rewound:
            return None
        self._say_redone()
        return self._next_new()

    def _say_redone(self) -> None:
        """Log, once, what it takes to get back to where the worker before this one had been, all but the last batch."""
        if self._redo_began is not None:
            seconds = time.monotonic() - self._redo_began
            self._publish(Record({"op": "redone", "num_requests": self._num_redone, "seconds": seconds}))
            self._redo_began = None

    def _runnable(self, requests: Iterable[Record], *, also: Collection[int] = ()) -> list[Record]:
        """Those to compute. The others end here: answered before and without effect, known to break a rank, or of a
        model or sampler that is lost.

        Args: also: seqs to compute although they were answered.
        """
        run = []
        for request in requests:
            self._backlog -= _size(request)
            if request.header["seq"] in self._redo.lost:
                self._lost[_needed(request)] = self._redo.lost[request.header["seq"]]
            if (lost := self._lost.get(_needed(request))) is not None:
                self._end_lost(request, lost)
                continue
            if not self._redo.is_answered(request) and request.header["seq"] in self._poison:
                self.finish(request, self._poison[request.header["seq"]])
                continue
            if self._redo.must_run(request) or request.header["seq"] in also:
                if request.header.get("compacted"):
                    raise EndWorker(
                        f"request {request.header['seq']} has to be computed again, but its payload was compacted away "
                        "because snapshots held it, and none of them can be used (the lines above say why, if any is "
                        "there). Bring the worker's snapshots/ folder back from a snapshot of the filesystem, or start "
                        "a new run from the last saved state."
                    )
                run.append(request)
                continue
            self._open.discard(request.header["seq"])
            if request.header["op"] == "sample" and not self._redo.is_held(request):
                self._touched.append(request.header["sampling_session_id"])
            for refusal in self._schedule.finish(request, error=self._redo.error_of(request)):
                self._refuse(refusal)
        return run

    def _orders(
        self,
        command: str,
        requests: Sequence[Record],
        snapshot: Order | None,
        groups: Sequence[Sequence[Record]] | None = None,
    ) -> Orders:
        self._record_batch(requests)
        # Samples that are not run again still decide which snapshot was used longest ago.
        touched, self._touched = self._touched, []
        if command == "sample":
            self._note_sampling(requests)
        order = {"command": command, "touched": touched, "snapshot": snapshot, **self._how(requests, groups)}
        return [Record(order), *map(self._complete, requests)]

    def _complete(self, request: Record) -> Record:
        """With what the request says is in results."""
        return self._guard(lambda: self._recorded.beside(request))

    def _how(
        self, requests: Sequence[Record], groups: Sequence[Sequence[Record]] | None = None
    ) -> dict[str, list[Any]]:
        """`groups`: the seqs of what is computed at once, in turn. `alone`: those of passes that are not to be computed
        together with others. `budgets`: [seq, tokens] of those whose micro-batches are to be smaller than the worker's.

        Args: groups: how the batch was cut when it ran first; None: it has not.
        """
        alone = self._alone_of(requests)
        run = {request.header["seq"] for request in requests if request.header["op"] != "sample"}
        cut = train_groups([r for r in requests if r.header["seq"] in run], alone) if groups is None else groups
        seqs = [[r.header["seq"] for r in group if r.header["seq"] in run] for group in cut]
        found = [(r.header["seq"], self._redo.token_budget(r) or self._budgets.get(r.header["seq"])) for r in requests]
        budgets = [[seq, budget] for seq, budget in found if budget is not None]
        return {"groups": [group for group in seqs if group], "alone": alone, "budgets": budgets}

    def _alone_of(self, requests: Iterable[Record]) -> list[int]:
        return [r.header["seq"] for r in requests if r.header["seq"] in self._alone or self._redo.ran_alone(r)]

    def _record_batch(self, requests: Sequence[Record]) -> None:
        """Say which requests run together, before their results (nothing if it is recorded already)."""
        if any(not self._redo.is_answered(request) for request in requests):
            self._publish(Record({"op": "batch", "seqs": [request.header["seq"] for request in requests]}))

    def _difference(self, request: Record, outcome: Answer | Failure) -> str | None:
        """Why a request that succeeded before did not come out the same on redo; None if it did."""
        if isinstance(outcome, Failure):
            return outcome.message
        return self._redo.difference(request, outcome[0])

    def _lose(self, request: Record, reason: str) -> str:
        """A model or sampler cannot be brought back: everything that asks for it from now on fails when its turn comes,
        and says what is returned here. What runs beside it, recorded or new, is not touched.

        That is recorded: a later worker starts from a snapshot that holds this request, or finds the file readable
        again, and would go on from weights that are not the recorded ones.
        """
        header = request.header
        if header["op"] == "open_sampler":
            error = f"this sampler was lost when its worker was restarted, and could not be opened again: {reason}"
        else:
            error = (
                f"model {header['model_id']} was lost when its worker was restarted: request {header['seq']} "
                f"({header['op']}) cannot be repeated: {reason}. Create the model again from its last checkpoint."
            )
        self._publish(Record({"op": "lost", "seq": header["seq"], "error": error}))
        self._lost[_needed(request)] = error
        return error

    def _end_lost(self, request: Record, error: str) -> None:
        """A request of what is lost is over, and so is the sampler that it would have made."""
        header = request.header
        self._open.discard(header["seq"])
        if header["op"] == "save_sampler_weights" and header.get("sampling_session_id") is not None:
            self._lost[header["sampling_session_id"]] = error
        if not self._redo.is_answered(request):
            self._answer(request, Failure("server", error), {}, {})
        self._schedule.finish(request, error=None)  # its samples come up in their turn, recorded ones too, and end here

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what was read and will never run."""
        self._backlog -= _size(refusal.request)
        self._open.discard(refusal.request.header["seq"])
        if not self._redo.is_answered(refusal.request):
            self._answer(refusal.request, Failure(refusal.category, refusal.error), {}, {})

    def _answer(
        self, request: Record, failure: Failure | None, fields: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> None:
        asked = request.header
        header = {key: asked.get(key) for key in ("request_id", "seq", "op", "model_id")}
        header |= {"ok": failure is None, "finished_at": time.time(), **fields}
        if failure is not None:
            header |= {"error": failure.message, "category": failure.category}
        self._publish(Record(header, arrays))

    def _publish(self, record: Record) -> None:
        self._guard(lambda: self._publisher.publish(record))

    def _check(self) -> None:
        """Whether results can still be written; the lease itself is looked at when idle and at every publication."""
        self._guard(self._publisher.check)
        for note in self._snapshots.take_notes():
            self._publish(Record(note))

    @staticmethod
    def _guard(action: Callable[[], T]) -> T:
        """What goes wrong here is not the failure of the request that runs now."""
        try:
            return action()
        except Exception as error:
            raise EndWorker(f"{type(error).__name__}: {error}") from error


def _needed(request: Record) -> str:
    """The model or sampler without which a request cannot run."""
    header = request.header
    return str(header["sampling_session_id" if header["op"] in ("open_sampler", "sample") else "model_id"])


def _size(request: Record) -> int:
    return 1024 + sum(array.nbytes for array in request.arrays.values())
