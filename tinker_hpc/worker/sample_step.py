"""Step 5 of a request. Before: worker/loop.py. After: megatron_adapters/decode.py, then worker/publisher.py.

Runs samples together, on all ranks. Each is answered as soon as it is finished; others may join on the way.
"""

from __future__ import annotations

import traceback
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
        admit: Callable[[], tuple[Sequence[Record], Sequence[int]]],
        break_off: Callable[[Sequence[Record], EndWorker], None],
    ) -> None:
        """Answer `requests` and those that `admit` brings between decode steps, each through `finish`.

        Beside them `admit` gives the seqs of samples that were cancelled; they are answered with an error at once.

        A failure of the whole batch becomes the failure of everything unanswered in it; it never raises for a request.
        Raises: EndWorker, also from `finish` and `admit`; where ranks parted over the batch, after `break_off` with
            what is unanswered.
        Collectives: those of Engine.sample and `admit`; at the end Ranks.agree.
        """
        arrived: list[Record] = []
        answered: set[int] = set()

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
                self._train_step.in_use.add(sampler)
                arrived.append(record)
            return prepared

        def admit_and_cancel() -> list[SampleRequest]:
            joining, cancelled = admit()
            for index, record in enumerate(arrived):
                if record.header["seq"] in cancelled:
                    self._engine.cancel_sample(index, CANCELLED)
            return prepare(joining)

        def on_finished(index: int, result: SampleResult) -> None:
            answered.add(index)
            outcome = sample_result(arrived[index], result) if result.error is None else Failure("user", result.error)
            finish(arrived[index], outcome)

        failure = None
        try:
            self._engine.sample(prepare(requests), on_finished, admit_and_cancel)
        except Exception as error:
            traceback.print_exc()
            failure = describe(error)
        finally:
            self._train_step.in_use.clear()
        unanswered = [record for index, record in enumerate(arrived) if index not in answered]
        try:
            failure = self._ranks.agree(failure)
        except EndWorker as apart:
            break_off(unanswered, apart)
            raise
        if failure is not None:
            for record in unanswered:
                finish(record, failure)
