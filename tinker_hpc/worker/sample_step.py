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
    ) -> None:
        """Answer `requests` and those that `admit` brings between decode steps, each through `finish`.

        Beside them `admit` gives the seqs of samples that were cancelled; they are answered with an error at once.

        Where it does not fit into memory, what is unanswered is begun again with half as many sequences at a time, at
        last one request after the other; `nobody` then takes the place of `admit`. Any other failure of the whole batch
        becomes the failure of everything unanswered in it; it never raises for a request. A request that fails before
        it is drawn, since its weights cannot be loaded, fails alone.
        Raises: EndWorker, also from `finish` and `admit`; where ranks parted over the batch, after `break_off` with
            what is unanswered.
        Collectives: those of Engine.sample and `admit`; at the end Ranks.agree.
        """
        left, failure = self._round(requests, finish, admit, break_off)
        max_live = sum(record.header["num_samples"] for record in left)
        while left and failure is not None and failure.out_of_memory and max_live > 1:
            max_live //= 2
            self._engine.recover_memory()
            if self._ranks.is_first:
                print(f"worker: sampling ran out of memory; {max_live} sequences at a time are tried", flush=True)
            left, failure = self._round(left, finish, nobody, break_off, max_live=max_live)
        for record in left:
            assert failure is not None
            outcome = failure
            if failure.out_of_memory:
                self._engine.recover_memory()
                again, why = self._round([record], finish, nobody, break_off, max_live=1)
                if not again:
                    continue
                outcome = _too_large(record, why or failure)
            finish(record, outcome)

    def _round(
        self,
        requests: Sequence[Record],
        finish: Finish,
        admit: Admit,
        break_off: BreakOff,
        *,
        max_live: int | None = None,
    ) -> tuple[list[Record], Failure | None]:
        """One run of the engine. Returns: what is unanswered after it, and why."""
        unanswered: dict[int, Record] = {}  # by seq, in order of arrival
        arrived: dict[int, Record] = {}  # those of them that the engine has, by its own order of arrival
        places = itertools.count()

        def answer(record: Record, outcome: Answer | Failure) -> None:
            del unanswered[record.header["seq"]]
            finish(record, outcome)

        def prepare(records: Sequence[Record]) -> list[SampleRequest]:
            unanswered.update((record.header["seq"], record) for record in records)
            prepared = []
            for record in records:
                request = self._prepared(record, break_off)
                if isinstance(request, Failure):
                    if request.out_of_memory:  # there may be room when nothing else is sampled
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
        return left, self._agree(failure, left, break_off)

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


def _too_large(request: Record, failure: Failure) -> Failure:
    header = request.header
    return Failure(
        "user",
        f"this sample does not fit into the worker's memory, not even one sequence at a time: a prompt of "
        f"{request.arrays['prompt'].size} tokens, max_tokens {header['max_tokens'] or 'not given'}. The worker goes "
        "on. Shorten the prompt, give a lower max_tokens, ask for less about the prompt, or run on more or larger "
        f"GPUs. The device said: {failure.message.splitlines()[0][:300]}",
    )
