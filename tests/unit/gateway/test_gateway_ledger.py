"""The gateway's memory: a replayed log gives what the first gateway knew; answers leave memory, not knowledge."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_hpc.gateway.answers import Answer, answer_of
from tinker_hpc.gateway.futures import FutureTable
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.log import Record


def header(op: str, request_id: str, **fields) -> dict:
    common = {"request_id": request_id, "op": op, "model_id": None, "seq_id": None, "digest": "d", "accepted_at": 1.0}
    return common | fields


CREATE = header(
    "create_model", "s:train:0:0", model_id="s:train:0", seq_id=0, session_id="s", lora={"rank": 8}, base_model="b"
)


def step(seq_id: int, **fields) -> dict:
    return header("optim_step", f"s:train:0:{seq_id}", model_id="s:train:0", seq_id=seq_id, adam={}, **fields)


LOG = [
    CREATE,
    step(1),
    header("rejected", "s:train:0:2", model_id="s:train:0", seq_id=2, asked="optim_step", error="no", category="user"),
    header("open_sampler", "s:sample:0:open", sampling_session_id="s:sample:0", source={"type": "base"}),
    header("save_sampler_weights", "s:train:0:3", model_id="s:train:0", seq_id=3, sampling_session_id="s:sample:1"),
    header("sample", "s:sample:0:0", seq_id=0, sampling_session_id="s:sample:0", num_samples=2),
    header(
        "rejected", "s:train:1:0", model_id="s:train:1", seq_id=0, asked="create_model", error="rank 0", category="user"
    ),
]


def test_a_replayed_log_is_the_same_knowledge():
    first, second = Ledger(), Ledger()
    for entry in LOG:
        first.enter(entry, 0)
        first.apply(entry, 0)
    second.replay(LOG, 0)
    for ledger in (first, second):
        assert set(ledger.models) == {"s:train:0"}
        assert ledger.models["s:train:0"].next_seq == 4
        assert set(ledger.samplers) == {"s:sample:0", "s:sample:1"}
        assert ledger.refused_models == {"s:train:1": "rank 0"}
        assert ledger.futures.pending(0) == 5
    for one, other in zip(first.futures, second.futures, strict=True):
        assert (one.request_id, one.digest, one.reply, one.facts, one.done) == (
            other.request_id,
            other.digest,
            other.reply,
            other.facts,
            other.done,
        )
    sample = first.futures.get("s:sample:0:0")
    assert sample is not None
    assert sample.reply == {
        "request_id": sample.request_id,
        "sample_sequence_ids": ["s:sample:0:0:0", "s:sample:0:0:1"],
    }
    replies = {future.op: future.reply for future in first.futures}
    assert replies["open_sampler"] == {"type": "create_sampling_session", "sampling_session_id": "s:sample:0"}
    assert replies["save_sampler_weights"] == {"request_id": "s:train:0:3", "model_id": "s:train:0"}


def test_what_is_known_for_ever_does_not_grow_with_the_number_of_samples():
    def kept(num_samples: int) -> float:
        """Bytes a request."""
        ledger, requests = Ledger(), range(300)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for n in requests:
            ledger.apply(header("sample", f"s:0:{n}", seq_id=n, sampling_session_id="s:0", num_samples=num_samples), 0)
            ledger.futures.finish(f"s:0:{n}", Answer("m", b"x"), (1, n))
            ledger.futures.release(f"s:0:{n}")
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return (after - before) / len(requests)

    assert kept(64) < kept(1) + 200


def test_a_record_written_twice_is_one_request():
    ledger = Ledger()
    ledger.replay([*LOG, *LOG], 0)
    assert len(ledger.futures) == len(LOG)
    assert ledger.models["s:train:0"].next_seq == 4


@given(st.permutations(range(1, 7)), st.integers(1, 6))
def test_the_gap_is_the_first_seq_id_that_never_came(order, missing):
    ledger = Ledger()
    ledger.replay([CREATE, *(step(seq_id) for seq_id in order if seq_id != missing)], 0)
    for seq_id in order:
        future = ledger.futures.get(f"s:train:0:{seq_id}")
        if future is not None:
            assert ledger.gap_before(future) == (missing if seq_id > missing else None)


def test_old_answers_leave_the_memory_but_stay_known():
    table = Ledger().futures
    table = FutureTable(max_answer_bytes=100)
    ledger = Ledger()
    ledger.futures = table
    ledger.replay([CREATE, *(step(i) for i in range(1, 5))], 0)
    for i in range(1, 5):
        table.finish(f"s:train:0:{i}", Answer("x", bytes(40)))
    assert [table.answer(f"s:train:0:{i}") is not None for i in range(1, 5)] == [False, False, True, True]
    future = table.get("s:train:0:1")
    assert future is not None and future.done
    table.finish("s:train:0:4", Answer("x", b"another result of the same request"))
    kept = table.answer("s:train:0:4")
    assert kept is not None and kept.body == bytes(40), "the first result counts"


def test_waiting_ends_when_woken_and_when_time_is_up():
    async def run() -> tuple[float, float]:
        ledger = Ledger()
        ledger.replay([CREATE], 0)
        future = ledger.futures.get("s:train:0:0")
        assert future is not None
        loop = asyncio.get_running_loop()
        started = loop.time()
        loop.call_later(0.05, ledger.futures.wake_pending, 0)
        await asyncio.gather(*(future.change(5.0) for _ in range(3)))
        woken = loop.time() - started
        await future.change(0.05)
        return woken, loop.time() - started - woken

    woken, timed_out = asyncio.run(run())
    assert 0.04 < woken < 1.0 and 0.04 < timed_out < 1.0


@pytest.mark.parametrize(
    ("fields", "facts", "expected"),
    [
        ({"op": "create_model"}, {}, b'"type":"create_model"'),
        ({"op": "create_model"}, {"state_path": "tinker://p"}, b'"type":"load_weights"'),
        ({"op": "save_sampler_weights"}, {"sampling_session_id": "s"}, b'"sampling_session_id":"s"'),
        ({"op": "save_sampler_weights", "path": "tinker://p"}, {}, b'"path":"tinker://p"'),
        ({"op": "save_state"}, {}, b'"category":"server"'),  # a result without its path: said, not raised
        ({"op": "sample", "stop_reasons": ["stop"]}, {}, b'"category":"server"'),
        (
            {"op": "optim_step", "ok": False, "error": "nan", "category": "user"},
            {},
            b'{"error":"nan","category":"user"}',
        ),
    ],
)
def test_answers(fields, facts, expected):
    record = Record({"request_id": "r", "model_id": "m", "ok": True, **fields})
    assert expected in answer_of(record, facts).body


def test_request_ids_of_different_kinds_never_meet():
    ids = [entry["request_id"] for entry in LOG]
    assert all(a != b for a, b in itertools.combinations(ids, 2))
