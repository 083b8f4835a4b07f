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
from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record
from tinker_hpc.worker.batch import sample_result, to_sample
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks, describe
from tinker_hpc.worker.schedule import CANCELLED
from tinker_hpc.worker.train_step import Answer, TrainStep

Finish = Callable[[Record, Answer | Failure], None]
Admit = Callable[[], tuple[Sequence[Record], Sequence[int]]]
"""Samples that join, and the seqs of those under way that are not wanted any more."""


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
        break_off: Callable[[Sequence[Record], EndWorker], None],
    ) -> None:
        """Answer `requests` and those that `admit` brings between decode steps, each through `finish`.

        Beside them `admit` gives the seqs of samples that were cancelled; they are answered with an error at once.

        Where it does not fit into memory, what is unanswered is begun again with half as many sequences at a time, at
        last one request after the other; `nobody` then takes the place of `admit`. Any other failure of the whole batch
        becomes the failure of everything unanswered in it; it never raises for a request.
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
        break_off: Callable[[Sequence[Record], EndWorker], None],
        *,
        max_live: int | None = None,
    ) -> tuple[list[Record], Failure | None]:
        """One run of the engine. Returns: what is unanswered after it, and why."""
        arrived: dict[int, Record] = {}  # and not answered, by place in the engine's order of arrival
        places = itertools.count()

        def prepare(records: Sequence[Record]) -> list[SampleRequest]:
            prepared = []
            for record in records:
                sampler = record.header["sampling_session_id"]
                try:
                    snapshot_id = self._train_step.snapshot_for(sampler)
                    prepared.append(to_sample(record, self._engine.info, snapshot_id=snapshot_id))
                except RequestError as error:
                    finish(record, describe(error))
                    continue
                self._train_step.in_use[sampler] += 1
                arrived[next(places)] = record
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
            finish(record, outcome)

        failure = None
        try:
            self._engine.sample(prepare(requests), on_finished, admit_and_cancel, max_live=max_live)
        except Exception as error:
            failure = describe(error)
            if not failure.out_of_memory:
                traceback.print_exc()
        finally:
            self._train_step.in_use.clear()
        unanswered = list(arrived.values())
        try:
            failure = self._ranks.agree(failure)
        except EndWorker as apart:
            break_off(unanswered, apart)
            raise
        return unanswered, failure


def _too_large(request: Record, failure: Failure) -> Failure:
    header = request.header
    return Failure(
        "user",
        f"this sample does not fit into the worker's memory, not even one sequence at a time: a prompt of "
        f"{request.arrays['prompt'].size} tokens, max_tokens {header['max_tokens'] or 'not given'}. The worker goes "
        "on. Shorten the prompt, give a lower max_tokens, ask for less about the prompt, or run on more or larger "
        f"GPUs. The device said: {failure.message.splitlines()[0][:300]}",
    )
