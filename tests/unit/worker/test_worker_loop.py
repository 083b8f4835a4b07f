"""What every rank does with rank 0's orders: here one rank, whose desk and memory are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinker_hpc.log import Record
from tinker_hpc.worker.hang import HangWatch
from tinker_hpc.worker.loop import Loop
from tinker_hpc.worker.poison import read_budget_notes
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks


class Desk:
    """Gives the orders it was made with, one after the other; `cutting_in`: those while samples are under way."""

    def __init__(self, orders: list[list[Record]], cutting_in: list[list[Record]]) -> None:
        self.orders, self.cutting_in = orders, cutting_in
        self.answers: dict[int, Any] = {}

    def next_orders(self) -> list[Record]:
        return self.orders.pop(0)

    def orders_while_sampling(self) -> list[Record]:
        return self.cutting_in.pop(0)

    def finish(self, request: Record, outcome: Any, *, seconds: float | None = None) -> None:
        self.answers[request.header["seq"]] = outcome

    def sampling_starts(self) -> None: ...

    def training_done(self, seconds: float) -> None: ...

    def flush(self) -> None: ...


class TrainStep:
    """Computes what fits: micro-batches of at most `room` tokens."""

    token_budget = 64

    def __init__(self) -> None:
        self.room = 64
        self.tried: list[int | None] = []

    def run(self, request: Record, *, token_budget: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.tried.append(token_budget)
        if (token_budget or self.token_budget) > self.room:
            raise MemoryError
        return {"token_budget": token_budget}, {}

    def touch(self, samplers: list[str]) -> None: ...

    def recover_memory(self) -> None: ...


class SampleStep:
    """Looks for others `times` times, while its cache leaves training room for so many tokens."""

    def __init__(self, train_step: TrainStep, times: int, room: int) -> None:
        self.train_step, self.times, self.room = train_step, times, room

    def run(self, requests, finish, admit, nobody, break_off, *, max_live=None) -> None:
        before, self.train_step.room = self.train_step.room, self.room
        for _ in range(self.times):
            admit()
        self.train_step.room = before


def order(command: str, *requests: Record, num_samples: int = 0) -> list[Record]:
    seqs = [[request.header["seq"]] for request in requests if request.header["op"] != "sample"]
    how = {"groups": seqs, "alone": [], "budgets": [], "cancelled": [], "touched": [], "snapshot": None}
    return [Record({"command": command, "num_samples": num_samples, **how}), *requests]


def a_pass(seq: int) -> Record:
    arrays = {"tokens": np.zeros(64, np.int32), "offsets": np.arange(0, 65, 8)}
    return Record({"op": "forward_backward", "seq": seq, "model_id": "m"}, arrays)


SAMPLE = Record({"op": "sample", "seq": 1}, {"prompt": np.zeros(4, np.int32)})


class ShortOfMemory:
    """All ranks have to start again over the samples."""

    def __init__(self) -> None:
        self.max_live: list[int | None] = []

    def run(self, requests, finish, admit, nobody, break_off, *, max_live=None) -> None:
        self.max_live.append(max_live)
        apart = EndWorker("all ranks ran out of memory", Failure("server", "no room", out_of_memory=True))
        break_off(requests, apart)
        raise apart


def run_loop(folder: Path, train_step: TrainStep, orders: list[list[Record]], cutting_in: list[list[Record]]) -> Desk:
    """With room for 20 tokens beside samples. Returns: the desk, with its answers."""
    desk: Any = Desk(orders, cutting_in)
    sample_step: Any = SampleStep(train_step, times=len(cutting_in), room=20)
    watch = HangWatch(arm=lambda _: None, disarm=lambda: None)
    computing: Any = train_step
    nothing: Any = None
    loop = Loop(folder, Ranks(None, 0, 1), computing, sample_step, nothing, hang=watch, desk=desk)
    assert loop.run() is False
    return desk


def test_training_that_cuts_into_sampling_remembers_what_fitted_until_that_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = TrainStep()
    orders = [order("sample", SAMPLE), order("train", a_pass(5)), order("close")]
    desk = run_loop(tmp_path, train_step, orders, [order("join", a_pass(seq)) for seq in (2, 3, 4)])
    assert train_step.tried == [None, 32, 16, 16, 16, None], "found once, and not where nothing is sampled"
    assert {seq: answer[0]["token_budget"] for seq, answer in desk.answers.items()} == {2: 16, 3: 16, 4: 16, 5: None}
    assert capsys.readouterr().out.count("do not fit into memory") == 2


def test_a_round_of_sampling_without_end_forgets_what_fitted_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinker_hpc.worker.loop.FITS_FOR", 3)
    train_step = TrainStep()
    cutting_in = [order("join", a_pass(seq)) for seq in range(2, 8)]
    run_loop(tmp_path, train_step, [order("sample", SAMPLE), order("close")], cutting_in)
    assert train_step.tried == [None, 32, 16, 16, 16, 16, None, 32, 16, 16]


def test_samples_over_which_all_ranks_start_again_are_drawn_fewer_at_a_time_then(tmp_path: Path) -> None:
    """At last one sequence alone: that is the request's own failure."""
    samples = [Record({"op": "sample", "seq": seq, "num_samples": 9}, SAMPLE.arrays) for seq in (1, 2)]
    sample_step: Any = ShortOfMemory()
    watch = HangWatch(arm=lambda _: None, disarm=lambda: None)
    nothing: Any = None
    tried = []
    for _ in range(3):
        orders = order("sample", *samples)
        orders[0].header["budgets"] = [[seq, most] for seq, most in read_budget_notes(tmp_path).items()]
        desk: Any = Desk([orders], [])
        steps: Any = TrainStep()
        loop = Loop(tmp_path, Ranks(None, 0, 1), steps, sample_step, nothing, hang=watch, desk=desk)
        with pytest.raises(EndWorker):
            loop.run()
        tried.append(sorted(desk.answers))
    assert sample_step.max_live == [None, 2, 1] and tried == [[], [], [1, 2]]
