"""Order within a model, freedom between models, nobody starves, nothing runs twice."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_hpc.log import Record
from tinker_hpc.worker.schedule import MAX_GROUP_REQUESTS, MAX_GROUP_TOKENS, Batch, Schedule

OPS = ("forward_backward", "optim_step", "save_state", "load_state", "rejected")


class Log:
    """Makes records with the next seq."""

    def __init__(self) -> None:
        self.seq = 0

    def __call__(self, op: str, model_id: str | None = None, seq_id: int | None = None, **fields: object) -> Record:
        self.seq += 1
        size = fields.pop("size", 10)
        arrays = {"tokens": np.zeros(size, np.int32)} if op == "forward_backward" else {}  # type: ignore[arg-type]
        header = {"seq": self.seq, "request_id": f"r{self.seq}", "op": op, "model_id": model_id, "seq_id": seq_id}
        return Record(header | fields, arrays)


def seqs(batch: Batch | None) -> list[int]:
    assert batch is not None
    return batch.seqs


def drain(schedule: Schedule) -> list[list[Record]]:
    """Run everything that can run; every request succeeds."""
    batches = []
    while (batch := schedule.next_batch()) is not None:
        batches.append(list(batch.requests))
        for request in batch.requests:
            assert schedule.finish(request, error=None) == []
    return batches


def with_model(*model_ids: str) -> tuple[Schedule, Log]:
    schedule, log = Schedule(), Log()
    for model_id in model_ids:
        assert schedule.add(log("create_model", model_id)) == []
    drain(schedule)
    return schedule, log


@st.composite
def histories(draw: st.DrawFn) -> list[Record]:
    """Requests of a few models in any order of arrival (each model's creation first), some sent twice."""
    log = Log()
    models = [f"m:{k}" for k in range(draw(st.integers(1, 3)))]
    todo = [(m, n) for m in models for n in range(1, draw(st.integers(0, 8)) + 1)]
    arrivals = draw(st.permutations(todo))
    records = [log("create_model", m) for m in models]
    for model_id, seq_id in arrivals:
        op = draw(st.sampled_from(OPS))
        records.append(log(op, model_id, seq_id, size=draw(st.sampled_from([1, 1000, 50_000, 200_000]))))
        if draw(st.integers(0, 9)) == 0:
            records.append(records[-1])
    return records


@settings(max_examples=200)
@given(histories(), st.data())
def test_every_model_runs_in_order_once_and_completely(records: list[Record], data: st.DataObject) -> None:
    schedule, ran = Schedule(), []
    pending = list(records)
    while True:
        for _ in range(data.draw(st.integers(0, 4))):  # reading and running alternate in any way
            if pending:
                assert schedule.add(pending.pop(0)) == []
        batch = schedule.next_batch()
        if batch is None:
            if not pending:
                break
            schedule.add(pending.pop(0))
            continue
        assert len(batch.requests) == 1 or {r.header["op"] for r in batch.requests} == {"forward_backward"}
        sizes = [r.arrays["tokens"].size for r in batch.requests if "tokens" in r.arrays]
        assert len(sizes) <= MAX_GROUP_REQUESTS and (len(sizes) <= 1 or sum(sizes) <= MAX_GROUP_TOKENS)
        ran += batch.requests
        for request in batch.requests:
            schedule.finish(request, error=None)
    by_model: dict[str, list[Record]] = defaultdict(list)
    for request in ran:
        by_model[request.header["model_id"]].append(request)
    for model_id in {r.header["model_id"] for r in records}:
        expected = [r for r in {r.header["seq"]: r for r in records}.values() if r.header["model_id"] == model_id]
        expected = [r for r in expected if r.header["op"] != "rejected"]
        expected.sort(key=lambda r: r.header["seq_id"] or 0)
        assert by_model[model_id] == expected


def test_a_gap_holds_its_model_and_no_other() -> None:
    schedule, log = with_model("a:0", "b:0")
    schedule.add(log("forward_backward", "a:0", 2))
    schedule.add(log("forward_backward", "b:0", 1))
    assert [[r.header["model_id"] for r in batch] for batch in drain(schedule)] == [["b:0"]]
    schedule.add(log("forward_backward", "a:0", 1))
    assert [[r.header["seq_id"] for r in batch] for batch in drain(schedule)] == [[1, 2]]


def test_a_rejected_request_closes_its_gap() -> None:
    schedule, log = with_model("a:0")
    schedule.add(log("optim_step", "a:0", 2))
    assert schedule.next_batch() is None
    schedule.add(log("rejected", "a:0", 1, error="no", category="user"))
    assert [r.header["seq_id"] for batch in drain(schedule) for r in batch] == [2]


def test_a_barrier_stops_its_model_only() -> None:
    schedule, log = with_model("a:0", "b:0")
    for op, seq_id in (("forward_backward", 1), ("optim_step", 2), ("forward_backward", 3)):
        schedule.add(log(op, "a:0", seq_id))
    schedule.add(log("forward_backward", "b:0", 1))
    batches = drain(schedule)
    assert [(r.header["model_id"], r.header["seq_id"]) for r in batches[0]] == [("a:0", 1), ("b:0", 1)]
    assert [[r.header["seq_id"] for r in batch] for batch in batches[1:]] == [[2], [3]]


def test_a_busy_model_does_not_starve_a_quiet_one() -> None:
    schedule, log = with_model("busy:0", "quiet:0")
    for seq_id in range(1, 101):
        schedule.add(log("optim_step", "busy:0", seq_id))
    for _ in range(3):
        schedule.next_batch()
    schedule.add(log("optim_step", "quiet:0", 1))
    waited = [schedule.next_batch() for _ in range(2)]
    assert any(b is not None and b.requests[0].header["model_id"] == "quiet:0" for b in waited)


def test_models_take_turns_within_a_group() -> None:
    schedule, log = with_model("busy:0", "quiet:0", "third:0")
    for seq_id in range(1, 5):
        schedule.add(log("forward_backward", "busy:0", seq_id))
    schedule.add(log("forward_backward", "quiet:0", 1))
    schedule.add(log("forward_backward", "third:0", 1))
    batch = schedule.next_batch()
    assert batch is not None
    names = [r.header["model_id"].split(":")[0] for r in batch.requests]
    assert names == ["busy", "quiet", "third", "busy", "busy", "busy"]


@settings(max_examples=200)
@given(st.lists(st.lists(st.sampled_from(OPS[:4]), min_size=0, max_size=30), min_size=2, max_size=8), st.data())
def test_nobody_starves(work: list[list[str]], data: st.DataObject) -> None:
    """Whoever has work is served within as many batches as there are others with work, whatever they bring meanwhile.

    Others' sizes, operations and arrivals are any; the sampler's work counts as one more.
    """
    models = [f"m:{k}" for k in range(len(work))]
    schedule, log = with_model(*models)
    schedule.add(log("open_sampler", sampling_session_id="s"))
    drain(schedule)
    sent, waited = dict.fromkeys(models, 0), dict.fromkeys(models, 0)
    queued: dict[str, int] = dict.fromkeys(models, 0)
    todo = [(model, op) for model, ops in zip(models, work, strict=True) for op in ops]
    todo = data.draw(st.permutations(todo))
    while todo or any(queued.values()):
        for _ in range(data.draw(st.integers(1, 6))):
            if todo:
                model, op = todo.pop()
                sent[model] += 1
                schedule.add(log(op, model, sent[model], size=data.draw(st.sampled_from([1, 30_000, 100_000]))))
                queued[model] += 1
        if data.draw(st.booleans()):
            schedule.add(log("sample", sampling_session_id="s"))
        batch = schedule.next_batch()
        assert batch is not None
        served = {r.header["model_id"] for r in batch.requests}
        for request in batch.requests:
            schedule.finish(request, error=None)
            if request.header["model_id"] in queued:
                queued[request.header["model_id"]] -= 1
        for model in models:
            waited[model] = 0 if model in served or not queued[model] else waited[model] + 1
            assert waited[model] <= len(models), f"{model} has work and was passed over {waited[model]} times"


def test_samples_and_training_take_turns() -> None:
    schedule, log = with_model("a:0")
    schedule.add(log("open_sampler", sampling_session_id="s"))
    drain(schedule)
    kinds = []
    for seq_id in range(1, 5):
        schedule.add(log("optim_step", "a:0", seq_id))
    for _ in range(8):
        schedule.add(log("sample", sampling_session_id="s"))
        batch = schedule.next_batch()
        kinds.append(batch.kind if batch else None)
    assert kinds.count("train") == 4 and kinds[:2] != ["sample", "sample"]
    assert schedule.next_batch(sampling=False) is None


def test_samples_of_all_samplers_run_together() -> None:
    schedule, log = Schedule(), Log()
    for sampler in ("s", "t"):
        schedule.add(log("open_sampler", sampling_session_id=sampler))
    drain(schedule)
    wanted = [log("sample", sampling_session_id=s) for s in ("s", "t", "s")]
    for request in wanted:
        schedule.add(request)
    assert schedule.next_batch() == Batch("sample", tuple(wanted))


def test_a_sample_waits_for_its_sampler() -> None:
    schedule, log = with_model("a:0")
    schedule.add(log("save_sampler_weights", "a:0", 1, sampling_session_id="s"))
    schedule.add(log("sample", sampling_session_id="s"))
    batches = drain(schedule)
    assert [[r.header["op"] for r in batch] for batch in batches] == [["save_sampler_weights"], ["sample"]]


@pytest.mark.parametrize("opening", ["open_sampler", "save_sampler_weights"])
def test_a_sampler_that_failed_refuses_its_samples(opening: str) -> None:
    schedule, log = with_model("a:0")
    model = {} if opening == "open_sampler" else {"model_id": "a:0", "seq_id": 1}
    schedule.add(log(opening, sampling_session_id="s", **model))  # type: ignore[arg-type]
    early, late = (log("sample", sampling_session_id="s") for _ in range(2))
    assert schedule.add(early) == []
    batch = schedule.next_batch()
    assert batch is not None
    refusals = schedule.finish(batch.requests[0], error="no such file") + schedule.add(late)
    assert [r.request for r in refusals] == [early, late]
    assert all("no such file" in r.error for r in refusals)
    assert schedule.next_batch() is None


def test_a_model_that_failed_refuses_its_requests() -> None:
    schedule, log = Schedule(), Log()
    schedule.add(log("create_model", "a:0"))
    first, held, late = (log("optim_step", "a:0", n) for n in (1, 3, 2))
    schedule.add(first), schedule.add(held)
    schedule.add(log("rejected", "a:0", 4))
    batch = schedule.next_batch()
    assert batch is not None
    refusals = schedule.finish(batch.requests[0], error="rank 0") + schedule.add(late)
    assert [r.request for r in refusals] == [first, held, late]
    assert all(r.error == "model a:0 could not be created: rank 0" for r in refusals)
    assert schedule.next_batch() is None


def test_samplers_that_a_failed_model_would_have_made_fail_with_it() -> None:
    schedule, log = Schedule(), Log()
    schedule.add(log("create_model", "a:0"))
    snapshot, held = (log("save_sampler_weights", "a:0", n, sampling_session_id=f"s{n}") for n in (1, 3))
    samples = [log("sample", sampling_session_id=f"s{n}") for n in (1, 3)]
    for request in (snapshot, held, *samples):
        assert schedule.add(request) == []
    batch = schedule.next_batch()
    assert batch is not None
    refusals = schedule.finish(batch.requests[0], error="rank 0")
    late = log("sample", sampling_session_id="s1")
    refusals += schedule.add(late)
    assert {r.request.header["seq"] for r in refusals} == {r.header["seq"] for r in (snapshot, held, *samples, late)}
    assert all(r.error == "model a:0 could not be created: rank 0" for r in refusals)


def test_what_can_never_run_is_refused_with_a_reason() -> None:
    schedule, log = with_model("a:0")
    schedule.add(log("optim_step", "a:0", 1))
    cases = {
        "seq_id 1 of model a:0 was used": log("optim_step", "a:0", 1),
        "model 'b:0' was never created": log("optim_step", "b:0", 1),
        "sampler 's' is not known": log("sample", sampling_session_id="s"),
        "model a:0 exists already": log("create_model", "a:0"),
        "does not know the operation 'fly'": log("fly", "a:0", 2),
    }
    for message, request in cases.items():
        (refusal,) = schedule.add(request)
        assert refusal.request is request and message in refusal.error and refusal.category == "user"
    assert [r.header["seq_id"] for batch in drain(schedule) for r in batch] == [1]


def test_a_record_that_is_in_the_log_twice_runs_once() -> None:
    schedule, log = with_model("a:0")
    request = log("optim_step", "a:0", 1)
    again = Record({**request.header, "seq": 99})
    assert schedule.add(request) == [] and schedule.add(again) == []
    assert [b[0].header["seq"] for b in drain(schedule)] == [request.header["seq"]]
    assert schedule.add(again) == [], "also after it ran"


def test_after_close_what_still_waits_is_given_up() -> None:
    schedule, log = with_model("a:0")
    held, rejected = log("optim_step", "a:0", 3), log("rejected", "a:0", 4)
    schedule.add(held), schedule.add(rejected)
    schedule.add(log("save_sampler_weights", "a:0", 2, sampling_session_id="s"))
    sample = log("sample", sampling_session_id="s")
    schedule.add(sample)
    schedule.add(log("close"))
    assert schedule.closing and schedule.next_batch() is None
    refusals = schedule.abandon()
    assert {r.request.header["seq"] for r in refusals} >= {held.header["seq"], sample.header["seq"]}
    assert rejected not in [r.request for r in refusals] and all(r.category == "server" for r in refusals)
    assert schedule.abandon() == []


def test_a_recorded_batch_is_taken_exactly_or_not_at_all() -> None:
    schedule, log = with_model("a:0", "b:0")
    a1, a2, b1 = log("forward_backward", "a:0", 1), log("forward_backward", "a:0", 2), log("forward_backward", "b:0", 1)
    for request in (a1, a2, b1):
        schedule.add(request)
    assert schedule.take([a1.header["seq"], 99]) is None
    assert schedule.take([a2.header["seq"]]) is None, "a1 comes first"
    assert schedule.take([b1.header["seq"], a1.header["seq"]]) == [b1, a1]
    assert seqs(schedule.next_batch()) == [a2.header["seq"]]


def test_recorded_samples_are_taken_too() -> None:
    schedule, log = Schedule(), Log()
    schedule.add(log("open_sampler", sampling_session_id="s"))
    drain(schedule)
    one, two = (log("sample", sampling_session_id="s") for _ in range(2))
    schedule.add(one), schedule.add(two)
    assert schedule.take([two.header["seq"]]) == [two]
    assert seqs(schedule.next_batch()) == [one.header["seq"]]


def test_cancelled_samples_leave_the_queue_and_the_others_stay():
    schedule, log = Schedule(), Log()
    schedule.add(log("open_sampler", sampling_session_id="open"))
    drain(schedule)
    schedule.add(log("open_sampler", sampling_session_id="later"))
    ready, waiting = ([log("sample", sampling_session_id=sampler) for _ in range(3)] for sampler in ("open", "later"))
    for request in (*ready, *waiting):
        assert schedule.add(request) == []
    for request_id in (ready[1].header["request_id"], waiting[0].header["request_id"], "running"):
        assert schedule.add(log("cancel", cancels=request_id)) == []
    refusals, others = schedule.take_cancelled()
    assert [refusal.request for refusal in refusals] == [ready[1], waiting[0]] and others == {"running"}
    assert all("cancelled by its client" in refusal.error for refusal in refusals)
    assert schedule.take_cancelled() == ([], set())
    ran = [request for batch in drain(schedule) for request in batch if request.header["op"] == "sample"]
    assert ran == [ready[0], ready[2], *waiting[1:]]


def test_a_recorded_batch_is_taken_whole_although_a_sample_of_it_was_cancelled():
    schedule, log = Schedule(), Log()
    schedule.add(log("open_sampler", sampling_session_id="open"))
    drain(schedule)
    samples = [log("sample", sampling_session_id="open") for _ in range(2)]
    for request in samples:
        schedule.add(request)
    schedule.add(log("cancel", cancels=samples[0].header["request_id"]))
    assert schedule.take([request.header["seq"] for request in samples]) == samples
    assert schedule.take_cancelled() == ([], {samples[0].header["request_id"]})
