"""Samples of one rank on the real decode loop; its model is made up, and so is whose weights can be loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_adapters.cached_attention import DecodeAttention
from megatron_adapters.decode import Decoder
from megatron_adapters.kv_cache import KvCache, KvShape
from megatron_adapters.sample_ranks import SampleRanks
from megatron_adapters.sample_request import SampleRequest
from megatron_adapters.token_forward import Decoded, Prefilled, PrefillRow
from tinker_hpc.log import Record
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks
from tinker_hpc.worker.sample_step import SampleStep

VOCABULARY = 10
SHAPE = KvShape(num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))


class Engine:
    """Every token is as likely as any other. Notes how many sequences went through each of its steps."""

    def __init__(self) -> None:
        self.info: Any = self
        self.eos_token_ids = ()
        self.steps: list[int] = []
        self.num_runs = self.num_recovered = 0
        self.most_at_once = self.longest_prompt = 1000
        self.when_memory_is_recovered: Callable[[], None] = lambda: None
        cache = KvCache(SHAPE, 10_000, max_context=256, max_rows=64)
        self._decoder = Decoder(
            self,
            cache,
            SampleRanks(),
            vocab_size=VOCABULARY,
            known_snapshots=lambda: [],
            decode_text=lambda: lambda tokens: "",
        )
        self.cancel_sample = self._decoder.cancel

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: Any, admit: Any, *, max_live: int | None = None
    ) -> None:
        self.num_runs += 1
        self._decoder.run(requests, on_finished, admit, max_live=max_live)

    def recover_memory(self) -> None:
        self.num_recovered += 1
        self.when_memory_is_recovered()

    def prefill(self, rows: Sequence[PrefillRow]) -> Prefilled:
        if any(len(row.tokens) > self.longest_prompt for row in rows):
            raise MemoryError("a long prompt")
        return Prefilled(torch.zeros(len(rows), VOCABULARY), [None] * len(rows), [None] * len(rows))

    def join_others(self) -> None: ...

    def decode(
        self, tokens: Sequence[int], positions: Any, weights: Any, attention: DecodeAttention, *, note_experts: bool
    ) -> Decoded:
        self.steps.append(len(tokens))
        if len(tokens) > self.most_at_once:
            raise MemoryError(f"{len(tokens)} sequences")
        return Decoded(torch.zeros(len(tokens), VOCABULARY))


class Weights:
    """What can be loaded; of the samplers in `broken`, what loading them raises."""

    def __init__(self) -> None:
        self.in_use: Counter[str] = Counter()
        self.broken: dict[str, Exception] = {}

    def snapshot_for(self, sampler: str) -> None:
        if sampler in self.broken:
            raise self.broken[sampler]


class Samples:
    """One call of SampleStep.run. Every joining takes the next entry of `joins` or `cancels`, by the step it is at."""

    def __init__(self) -> None:
        self.engine, self.weights = Engine(), Weights()
        self.ranks = Ranks(None, 0, 1)
        self.joins: dict[int, Sequence[Record]] = {}
        self.cancels: dict[int, Sequence[int]] = {}
        self.answers: dict[int, Any] = {}
        self.broken_off: list[int] = []
        self.in_use_after: dict[int, set[str]] = {}
        self.num_asked = 0

    def run(self, *requests: Record) -> None:
        engine: Any = self.engine
        weights: Any = self.weights
        SampleStep(engine, self.ranks, weights).run(
            requests, self._finish, self._admit, lambda: ((), ()), self._break_off
        )

    def _admit(self) -> tuple[Sequence[Record], Sequence[int]]:
        self.num_asked += 1
        return self.joins.get(self.num_asked, ()), self.cancels.get(self.num_asked, ())

    def _finish(self, request: Record, outcome: Any) -> None:
        seq = request.header["seq"]
        assert seq not in self.answers, "answered twice"
        self.answers[seq] = outcome
        self.in_use_after[seq] = set(self.weights.in_use)

    def _break_off(self, requests: Sequence[Record], apart: BaseException) -> None:
        self.broken_off += [request.header["seq"] for request in requests]

    def errors(self) -> dict[int, str]:
        return {seq: outcome.message for seq, outcome in self.answers.items() if isinstance(outcome, Failure)}


def sample(seq: int, sampler: str = "a", *, tokens: int = 4, num_samples: int = 1, prompt: int = 2) -> Record:
    header = {"op": "sample", "seq": seq, "sampling_session_id": sampler, "num_samples": num_samples}
    header |= {"max_tokens": tokens, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": seq}
    return Record({**header, "stop": {"type": "none"}}, {"prompt": np.ones(prompt, np.int32)})


def test_weights_are_in_use_until_the_last_of_their_answers_and_no_longer() -> None:
    samples = Samples()
    samples.joins = {2 * number: [sample(2 + number, "b", tokens=5)] for number in range(1, 7)}
    samples.run(sample(1, "a", tokens=3), sample(2, "a", tokens=5))
    assert samples.in_use_after == {1: {"a", "b"}, **{seq: {"b"} for seq in range(2, 8)}, 8: set()}
    assert samples.engine.num_runs == 1 and not samples.errors()


def test_a_cancelled_sample_is_answered_and_the_others_drawn() -> None:
    samples = Samples()
    samples.joins, samples.cancels = {4: [sample(4)]}, {5: [2, 4]}
    samples.run(sample(1, tokens=2), sample(2, tokens=50), sample(3, tokens=9))
    assert samples.errors().keys() == {2, 4} and samples.answers.keys() == {1, 2, 3, 4}
    assert len(samples.engine.steps) == 8


@pytest.mark.parametrize("joining", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("what was it"), OSError(5, "Input/output error", "/file"), KeyError(1)])
def test_weights_that_cannot_be_loaded_fail_their_samples_alone(error: Exception, joining: bool) -> None:
    samples = Samples()
    samples.weights.broken = {"broken": error}
    first, *others = [sample(1), sample(2, "broken"), sample(3, "b"), sample(4, "broken")]
    samples.joins = {2: others} if joining else {}
    samples.run(first, *(() if joining else others))
    assert samples.answers.keys() == {1, 2, 3, 4} and samples.errors().keys() == {2, 4}
    assert str(error.args[-1]).split("/")[0] in samples.errors()[2]
    assert samples.engine.num_runs == 1, "what was live stays live"


@pytest.mark.parametrize("joining", [False, True])
@pytest.mark.parametrize("passes", [False, True])
def test_weights_without_room_are_loaded_again_when_nothing_else_is_there(joining: bool, passes: bool) -> None:
    samples = Samples()
    samples.weights.broken = {"large": MemoryError("no room for these")}
    if passes:
        samples.engine.when_memory_is_recovered = samples.weights.broken.clear
    first, *others = [sample(1), sample(2, "large"), sample(3, "b")]
    samples.joins = {2: others} if joining else {}
    samples.run(first, *(() if joining else others))
    assert samples.answers.keys() == {1, 2, 3} and samples.errors().keys() == (set() if passes else {2})
    assert passes or "the weights of sampler large do not fit" in samples.errors()[2]
    assert samples.engine.steps[-1] == 2, "the others are drawn together"
    assert not samples.weights.in_use


@pytest.mark.parametrize("joining", [False, True])
def test_where_one_rank_alone_cannot_load_the_weights_only_their_sample_is_to_blame(joining: bool) -> None:
    class Parting(Ranks):
        def agree(self, failure: Failure | None) -> Failure | None:
            if failure is not None:
                raise EndWorker("rank 0 of 2 failed alone", failure)
            return None

    samples = Samples()
    samples.ranks = Parting(None, 0, 1)
    samples.weights.broken = {"broken": MemoryError()}
    first, *others = [sample(1), sample(2, "broken"), sample(3, "b")]
    samples.joins = {2: others} if joining else {}
    with pytest.raises(EndWorker):
        samples.run(first, *(() if joining else others))
    assert samples.broken_off == [2]


def test_after_too_many_at_once_fewer_are_drawn_and_the_others_still_join_or_leave() -> None:
    samples = Samples()
    samples.engine.most_at_once = 4
    samples.joins, samples.cancels = {3: [sample(8, tokens=3)], 12: [sample(9)]}, {4: [7]}
    samples.run(*(sample(seq, tokens=9) for seq in range(1, 8)))
    assert samples.answers.keys() == set(range(1, 10)) and samples.errors().keys() == {7}
    assert samples.engine.steps[:2] == [7, 3] and samples.engine.num_runs == 2
    assert samples.engine.num_recovered == 1


def test_only_what_does_not_fit_by_itself_is_refused_and_then_nobody_is_held_up() -> None:
    samples = Samples()
    samples.engine.longest_prompt = 20
    samples.joins = {2: [sample(4, prompt=30), sample(5), sample(6)]}
    samples.run(sample(1, tokens=9), sample(2, tokens=9), sample(3, tokens=9))
    assert samples.answers.keys() == set(range(1, 7)) and samples.errors().keys() == {4}
    assert "not even one sequence at a time: a prompt of 30 tokens" in samples.errors()[4]
    assert samples.engine.steps[-1] == 2, "5 and 6 are drawn together"
    assert not samples.weights.in_use


def test_where_ranks_parted_while_weights_were_read_their_sample_is_not_run_again() -> None:
    samples = Samples()
    apart: Any = EndWorker("rank 1 of 2 failed alone", Failure("server", "stale file handle"))
    samples.weights.broken["b"] = apart
    with pytest.raises(EndWorker):
        samples.run(sample(1, "a"), sample(2, "b"), sample(3, "a"))
    assert samples.broken_off == [2] and not samples.answers
