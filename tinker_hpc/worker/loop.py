"""Step 5 of a request. Before: worker/desk.py on rank 0. After: worker/train_step.py, worker/sample_step.py.

The same loop on every rank: rank 0 broadcasts what its desk decided, all ranks do it, rank 0 answers.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tinker_hpc.log import Record
from tinker_hpc.worker import split
from tinker_hpc.worker.desk import Desk, Orders
from tinker_hpc.worker.hang import HangWatch
from tinker_hpc.worker.parting import Parted
from tinker_hpc.worker.poison import leave_alone_notes, leave_budget_notes, leave_note
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks, describe
from tinker_hpc.worker.sample_step import SampleStep
from tinker_hpc.worker.snapshot_step import Order, SnapshotStep
from tinker_hpc.worker.train_step import Answer, TrainStep

_COMPUTING = frozenset({"forward_backward", "optim_step"})
_PREFILL_TOKENS = 4096
"""At most what is computed between two decode steps, unless one prompt is longer (megatron_adapters/decode.py)."""

_FEWER = 8
"""Where all ranks have to start again since samples ran out of memory, so many times fewer of them are drawn at a time:
each try costs a start."""
FITS_FOR = 32
"""So many groups of passes that cut into sampling take the micro-batches that fitted beside it; the next tries the
worker's again. A round of sampling that others keep joining has no end, and its cache does not stay as full as it was.
"""


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
        hang: HangWatch,
        desk: Desk | None,
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._train_step = train_step
        self._sample_step = sample_step
        self._snapshots = snapshots
        self._hang = hang
        self._desk = desk
        self._prompt_tokens = 0
        """Of the longest prompt of this round of sampling."""
        self._sampling = False
        self._max_live: int | None = None
        """Sequences at a time in this round of sampling, where more had been too many."""
        self._fits_beside: int | None = None
        """The micro-batches that fitted beside this round's samples, whose cache stays while training cuts in; None:
        the worker's do, as far as is known. Equal on all ranks.
        """
        self._fits_for = 0
        """How many more groups of passes take it."""

    def run(self) -> bool:
        """Returns False after `close`, everything answered and durable; True if the worker has to begin again from a
        state before requests that were taken back.

        Raises: EndWorker if this worker cannot go on: lease lost, logs damaged, ranks of different states. Parted if it
            was asked to end and its state is on the disk.
        Collectives: first one Ranks.agree; per batch one Ranks.broadcast, those of its steps, and one Ranks.agree per
            request or group of passes.
        """
        self._ranks.agree(None)  # a rank may have read its part of the state for an hour longer
        while True:
            orders = self._tell(self._desk.next_orders() if self._desk else None)
            if not orders:
                continue
            command, requests = orders[0].header["command"], orders[1:]
            if command in ("close", "rewind"):
                return command == "rewind"
            self._train_step.touch(orders[0].header["touched"])
            self._take_snapshot(orders[0].header["snapshot"])
            if command == "part":
                self._part()
            if command == "idle":
                continue
            if command == "train":
                self._train(requests, orders[0].header)
            else:
                if self._desk:
                    self._desk.sampling_starts()
                self._note_prompts(requests)
                self._sampling = True
                self._max_live = min((most for _, most in orders[0].header["budgets"]), default=None)
                self._sample_step.run(
                    requests,
                    self._finish,
                    self._admit,
                    self._nobody_joins,
                    self._break_off,
                    max_live=self._max_live,
                )
                self._hang.rest()
                self._prompt_tokens = 0
                self._sampling, self._fits_beside = False, None

    def _admit(self) -> tuple[Sequence[Record], Sequence[int]]:
        """Called between decode steps: samples that join, and the seqs of those that nobody wants any more.

        A training batch whose turn it is runs in here.
        """
        self._hang.rest()
        joining, cancelled = self._joining()
        self._note_prompts(joining)
        self._hang.expect(_PREFILL_TOKENS + self._prompt_tokens)
        return joining, cancelled

    def _nobody_joins(self) -> tuple[Sequence[Record], Sequence[int]]:
        self._hang.expect(_PREFILL_TOKENS + self._prompt_tokens)
        return (), ()

    def _tell(self, orders: Orders | None) -> Orders:
        """Rank 0's orders, on every rank. The others wait for them as long as it takes; rank 0 knows that they wait."""
        if self._desk:
            self._hang.expect()
        orders = self._ranks.broadcast(orders)
        self._hang.rest()
        return orders

    def _note_prompts(self, samples: Sequence[Record]) -> None:
        self._prompt_tokens = max([self._prompt_tokens, *(request.arrays["prompt"].size for request in samples)])

    def _joining(self) -> tuple[Sequence[Record], Sequence[int]]:
        orders = self._tell(self._desk.orders_while_sampling() if self._desk else None)
        if not orders:
            return [], []
        self._take_snapshot(orders[0].header["snapshot"])
        if orders[0].header["command"] == "part":
            self._part()  # which samples' weights were touched meanwhile does not matter any more
        num_samples = orders[0].header["num_samples"]
        training = orders[1 + num_samples :]
        if training:
            started = time.monotonic()
            self._train(training, orders[0].header)
            if self._desk:
                self._desk.training_done(time.monotonic() - started)
        return orders[1 : 1 + num_samples], orders[0].header["cancelled"]

    def _take_snapshot(self, order: Order | None) -> None:
        if order is not None:
            self._snapshots.take(order, self._desk.coverage() if self._desk else None)

    def _part(self) -> NoReturn:
        """End together, once rank 0 has everything on the disk. Collectives: one Ranks.broadcast."""
        if self._desk:
            self._desk.part()
        self._ranks.broadcast([] if self._desk else None)
        raise Parted

    def _train(self, requests: Sequence[Record], how: Mapping[str, Any]) -> None:
        """`how`: the desk's order: what is computed at once, which passes are not to be mixed, and whose micro-batches
        are smaller.
        """
        alone, budgets = how["alone"], dict(how["budgets"])
        of_seq = {request.header["seq"]: request for request in requests}
        for seqs in how["groups"]:
            group = [of_seq[seq] for seq in seqs]
            given = [budgets[r.header["seq"]] for r in group if r.header["seq"] in budgets]
            if self._fits_beside is not None and group[0].header["op"] == "forward_backward":
                given.append(self._fits_beside)
                self._fits_for -= 1
                if self._fits_for == 0:
                    self._fits_beside = None
            budget = min(given) if given else None
            with self._watched(group):
                if len(group) > 1:
                    self._train_together(group, budget)
                else:
                    self._train_one(group[0], budget, alone=group[0].header["seq"] in alone)

    @contextmanager
    def _watched(self, group: Sequence[Record]) -> Iterator[None]:
        """Computing must get on, until all ranks have agreed how it went. Files may take as long as they take."""
        if group[0].header["op"] in _COMPUTING:
            self._hang.expect(sum(request.arrays["tokens"].size for request in group if "tokens" in request.arrays))
        try:
            yield
        finally:
            self._hang.rest()

    def _train_one(self, request: Record, budget: int | None, *, alone: bool) -> None:
        """`alone` is said in the answer, so that redoing the batch does not mix the request with others either."""
        started = time.monotonic()
        outcome = self._run_one(request, budget)
        if alone and not isinstance(outcome, Failure):
            outcome = ({**outcome[0], "alone": True}, outcome[1])
        self._finish(request, outcome, seconds=time.monotonic() - started)

    def _train_together(self, passes: Sequence[Record], budget: int | None) -> None:
        """Passes of one or several models in one mixed batch. Where it does not fit into memory it is cut smaller.
        Where it fails as a whole all the same, or breaks one rank, nobody knows whose fault it was: each is then run
        alone, and only the one to blame fails.
        """
        started = time.monotonic()
        while True:
            outcomes: list[Answer | Exception] = []
            failure = None
            try:
                outcomes = self._train_step.run_passes(passes, token_budget=budget)
            except Exception as error:
                failure = describe(error)
                if not failure.out_of_memory:
                    print(f"worker: {len(passes)} passes together failed; each is run alone:", file=sys.stderr)
                    traceback.print_exc()
            try:
                failure = self._ranks.agree(failure)
            except EndWorker as apart:
                if apart.failure is not None and not self._cut_next_time(passes, budget, apart.failure):
                    leave_alone_notes(self._folder, passes)
                raise
            if failure is None:
                break
            smaller = self._smaller(passes, budget, failure)
            if smaller is None:
                for request in passes:
                    self._train_one(request, budget, alone=True)
                return
            budget = smaller
        self._ranks.require_equal([isinstance(outcome, Exception) for outcome in outcomes])
        seconds_per_token = (time.monotonic() - started) / sum(request.arrays["tokens"].size for request in passes)
        for request, outcome in zip(passes, outcomes, strict=True):
            answer = self._described(request, outcome) if isinstance(outcome, Exception) else outcome
            self._finish(request, answer, seconds=seconds_per_token * request.arrays["tokens"].size)

    def _run_one(self, request: Record, budget: int | None) -> Answer | Failure:
        tried: list[int] = []
        is_pass = request.header["op"] == "forward_backward"
        while True:
            answer: Answer = ({}, {})
            failure = None
            try:
                answer = self._train_step.run(request, token_budget=budget)
            except Exception as error:
                failure = self._described(request, error)
            try:
                failure = self._ranks.agree(failure)
            except EndWorker as apart:
                if not (is_pass and apart.failure and self._cut_next_time([request], budget, apart.failure)):
                    self._break_off([request], apart)
                raise
            if failure is None:
                return answer
            if not (failure.out_of_memory and is_pass):
                return failure
            tried.append(budget or self._train_step.token_budget)
            smaller = self._smaller([request], budget, failure)
            if smaller is None:
                return split.too_large(request, tried, failure)
            budget = smaller

    def _smaller(self, passes: Sequence[Record], budget: int | None, failure: Failure) -> int | None:
        """After all ranks agreed on a failure: the budget to try next; None if that would not help."""
        if not failure.out_of_memory:
            return None
        self._train_step.recover_memory()
        now = budget or self._train_step.token_budget
        smaller = split.smaller(passes, now)
        if self._sampling and smaller is not None:
            self._fits_beside, self._fits_for = smaller, FITS_FOR
        if self._desk:
            seqs = ", ".join(str(request.header["seq"]) for request in passes)
            then = (
                f"micro-batches of {smaller} tokens are tried"
                if smaller
                else "single sequences are as small as it gets"
            )
            print(f"worker: passes {seqs} do not fit into memory in micro-batches of {now} tokens; {then}", flush=True)
        return smaller

    def _cut_next_time(self, passes: Sequence[Record], budget: int | None, failure: Failure) -> bool:
        """One rank alone ran out of memory, and all start again: see to it that these are cut smaller then. False if
        that would not help.
        """
        if not failure.out_of_memory:
            return False
        smallest = split.last_resort(passes, budget or self._train_step.token_budget)
        if smallest is not None:
            leave_budget_notes(self._folder, passes, smallest)
        return smallest is not None

    @staticmethod
    def _described(request: Record, error: Exception) -> Failure:
        """What the user hears of it; what is our fault also goes to the worker's own log."""
        failure = describe(error)
        if failure.category == "server" and not failure.out_of_memory:
            print(f"worker: request {request.header['seq']} ({request.header['op']}) failed:", file=sys.stderr)
            traceback.print_exception(error)
        return failure

    def _break_off(self, requests: Sequence[Record], apart: EndWorker) -> None:
        """The ranks parted over these requests and all will start again: see to it that they are not tried again, or
        that samples for which memory was short are tried fewer at a time.
        """
        if apart.failure is None:
            return
        if apart.failure.out_of_memory and all(request.header["op"] == "sample" for request in requests):
            num_sequences = self._max_live or sum(request.header["num_samples"] for request in requests)
            if num_sequences > 1:
                leave_budget_notes(self._folder, requests, max(1, num_sequences // _FEWER))
                return
        if self._desk is None:
            leave_note(self._folder, requests, apart.failure)
            return
        for request in requests:
            self._desk.finish(request, apart.failure)
        self._desk.flush()

    def _finish(self, request: Record, outcome: Answer | Failure, seconds: float | None = None) -> None:
        if self._desk:
            with self._hang.resting():  # the disk may be full, and then this waits
                self._desk.finish(request, outcome, seconds=seconds)
