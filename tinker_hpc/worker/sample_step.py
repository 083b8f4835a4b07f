"""Step 5 of a request. Before: worker/loop.py. After: megatron_adapters/decode.py, then worker/publisher.py.

Runs samples together, on all ranks. Each is answered as soon as it is finished; others may join on the way.
"""

from __future__ import annotations

import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_adapters.engine import Engine
from megatron_adapters.sample_request import SampleRequest, SampleResult
from tinker_hpc.log import Record
from tinker_hpc.worker.batch import sample_result, to_sample
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks, describe
from tinker_hpc.worker.schedule import CANCELLED
from tinker_hpc.worker.train_step import Answer, TrainStep

Finish = Callable[[Record, Answer | Failure], None]
Admit = Callable[[], tuple[Sequence[Record], Sequence[int]]]
"""Samples that join, and the seqs of those under way that are not wanted any more."""
BreakOff = Callable[[Sequence[Record], EndWorker], None]


class SampleStep:
    """The sampling side of this worker."""

    def __init__(self, engine: Engine, ranks: Ranks, train_step: TrainStep) -> None:
        self._engine = engine
        self._ranks = ranks
        self._train_step = train_step

    def run(
        self,
        requests: Sequence[Record],
        finish: Finish,
        admit: Admit,
        nobody: Admit,
        break_off: BreakOff,
        *,
        max_live: int | None = None,
    ) -> None:
        """Answer `requests` and those that `admit` brings between decode steps, each through `finish`.

        Beside them `admit` gives the seqs of samples that were cancelled; they are answered with an error at once.
        `max_live`: sequences at a time, where more are known to be too many.

        Where it does not fit into memory, what is unanswered is begun again with half as many sequences at a time until
        that is drawn. What does not fit as a single sequence, or has weights that do not, is drawn by itself, with
        `nobody` in the place of `admit`; then the others go on. Any other failure of the whole batch
        becomes the failure of everything unanswered in it; it never raises for a request. A request that fails before
        it is drawn, since its weights cannot be loaded, fails alone.
        Raises: EndWorker, also from `finish` and `admit`; where ranks parted over the batch, after `break_off` with
            what is unanswered.
        Collectives: those of Engine.sample and `admit`; at the end Ranks.agree.
        """
        while requests:
            left, failure, suspect = self._round(requests, finish, admit, break_off, max_live=max_live)
            if failure is None or not left:
                return
            if not failure.out_of_memory:
                for record in left:
                    finish(record, failure)
                return
            began = {record.header["seq"] for record in requests}
            if began.isdisjoint(record.header["seq"] for record in left):
                max_live = None  # the engine's bound ended with them
            if suspect is None:
                num_sequences = max_live or sum(record.header["num_samples"] for record in left)
                if num_sequences > 1:
                    max_live = num_sequences // 2
                    if self._ranks.is_first:
                        tried = f"{max_live} sequences at a time are tried"
                        print(f"worker: sampling ran out of memory; {tried}", flush=True)
                else:
                    suspect = left[0]
            if suspect is not None and not self._alone(suspect, finish, nobody, break_off):
                max_live = None  # it was to blame, and not how many there were
            requests = [record for record in left if record is not suspect]

    def _alone(self, record: Record, finish: Finish, nobody: Admit, break_off: BreakOff) -> bool:
        """One sequence at a time, and nobody joins: what does not fit even so is this request's own. False if it does
        not.
        """
        left, failure, not_loaded = self._round([record], finish, nobody, break_off, max_live=1)
        if not left:
            return True
        assert failure is not None
        finish(record, _too_large(record, failure, not_loaded is not None) if failure.out_of_memory else failure)
        return False

    def _round(
        self,
        requests: Sequence[Record],
        finish: Finish,
        admit: Admit,
        break_off: BreakOff,
        *,
        max_live: int | None = None,
    ) -> tuple[list[Record], Failure | None, Record | None]:
        """One run of the engine. Returns: what is unanswered after it, why, and the one of these whose weights found no
        room, if that is why.
        """
        suspect: Record | None = None
        unanswered: dict[int, Record] = {}  # by seq, in order of arrival
        arrived: dict[int, Record] = {}  # those of them that the engine has, by its own order of arrival
        places = itertools.count()

        def answer(record: Record, outcome: Answer | Failure) -> None:
            del unanswered[record.header["seq"]]
            finish(record, outcome)

        def prepare(records: Sequence[Record]) -> list[SampleRequest]:
            nonlocal suspect
            unanswered.update((record.header["seq"], record) for record in records)
            prepared = []
            for record in records:
                request = self._prepared(record, break_off)
                if isinstance(request, Failure):
                    if request.out_of_memory:  # there may be room when nothing else is sampled
                        suspect = record
                        raise MemoryError(request.message)
                    answer(record, request)
                    continue
                self._train_step.in_use[record.header["sampling_session_id"]] += 1
                arrived[next(places)] = record
                prepared.append(request)
            return prepared

        def admit_and_cancel() -> list[SampleRequest]:
            joining, cancelled = admit()
            if cancelled:
                for index, record in arrived.items():
                    if record.header["seq"] in cancelled:
                        self._engine.cancel_sample(index, CANCELLED)
            return prepare(joining)

        def on_finished(index: int, result: SampleResult) -> None:
            record = arrived[index]
            outcome = sample_result(record, result) if result.error is None else Failure("user", result.error)
            del arrived[index]
            self._train_step.in_use -= Counter([record.header["sampling_session_id"]])  # at 0 it is no longer in there
            answer(record, outcome)

        failure = None
        try:
            self._engine.sample(prepare(requests), on_finished, admit_and_cancel, max_live=max_live)
        except Exception as error:
            failure = describe(error)
            if not failure.out_of_memory:
                traceback.print_exc()
        finally:
            self._train_step.in_use.clear()
        left = list(unanswered.values())
        failure = self._agree(failure, left, break_off)
        if failure is not None and failure.out_of_memory:
            self._engine.recover_memory()
        return left, failure, suspect

    def _prepared(self, record: Record, break_off: BreakOff) -> SampleRequest | Failure:
        """What the engine takes, or why there is none, which is this request's own failure; the same on every rank.

        Raises: EndWorker where ranks parted over it, after `break_off`.
        Collectives: those of TrainStep.snapshot_for. Unless the sampler's weights are in memory for others already,
            Ranks.agree: one rank alone may fail to load them.
        """
        sampler = record.header["sampling_session_id"]
        in_memory = sampler in self._train_step.in_use
        prepared = None
        failure = None
        try:
            snapshot_id = self._train_step.snapshot_for(sampler)
            prepared = to_sample(record, self._engine.info, snapshot_id=snapshot_id)
        except EndWorker as apart:
            break_off([record], apart)
            raise
        except Exception as error:
            failure = describe(error)
            if failure.category == "server" and not failure.out_of_memory:
                traceback.print_exc()
        if not in_memory:
            failure = self._agree(failure, [record], break_off)
        if failure is not None:
            return failure
        assert prepared is not None
        return prepared

    def _agree(self, failure: Failure | None, over: Sequence[Record], break_off: BreakOff) -> Failure | None:
        """As Ranks.agree does; where ranks parted over these requests, `break_off` hears of it first."""
        try:
            return self._ranks.agree(failure)
        except EndWorker as apart:
            break_off(over, apart)
            raise


def _too_large(request: Record, failure: Failure, not_loaded: bool) -> Failure:
    header = request.header
    said = failure.message.splitlines()[0][:300]
    if not_loaded:
        return Failure(
            "user",
            f"the weights of sampler {header['sampling_session_id']} do not fit into the worker's memory, not even "
            "while nothing else is sampled. The worker goes on. Train a lower rank, or run on more or larger GPUs. "
            f"The device said: {said}",
        )
    return Failure(
        "user",
        f"this sample does not fit into the worker's memory, not even one sequence at a time: a prompt of "
        f"{request.arrays['prompt'].size} tokens, max_tokens {header['max_tokens'] or 'not given'}. The worker goes "
        "on. Shorten the prompt, give a lower max_tokens, ask for less about the prompt, or run on more or larger "
        f"GPUs. The device said: {said}",
    )
