"""What of a training batch is computed at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinker_hpc.log import Record
from tinker_hpc.worker.batch import train_groups


def request(seq: int, model: str, op: str = "forward_backward", forward_only: bool = False) -> Record:
    fields = {"forward_only": forward_only} if op == "forward_backward" else {}
    return Record({"seq": seq, "op": op, "model_id": model, **fields}, {})


def seqs(groups: list[list[Record]]) -> list[list[int]]:
    return [[r.header["seq"] for r in group] for group in groups]


def test_passes_of_different_models_mix() -> None:
    requests = [request(1, "a"), request(2, "b"), request(3, "c"), request(4, "a"), request(5, "b")]
    assert seqs(train_groups(requests, ())) == [[1, 2, 3], [4, 5]]
    assert seqs(train_groups(requests, {2})) == [[1], [2], [3, 4, 5]]


def test_passes_of_one_model_do_not() -> None:
    assert seqs(train_groups([request(1, "a"), request(2, "a")], ())) == [[1], [2]]


def test_only_one_kind_mixes() -> None:
    requests = [request(1, "a"), request(2, "b", forward_only=True), request(3, "c", forward_only=True)]
    assert seqs(train_groups(requests, ())) == [[1], [2, 3]]
    assert seqs(train_groups([request(1, "a", "optim_step")], ())) == [[1]]
    assert train_groups([], ()) == []


REQUESTS = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=12)


@given(REQUESTS)
def test_order_is_kept_and_nothing_lost(drawn: list[tuple[str, bool, bool]]) -> None:
    requests = [request(seq, model, forward_only=kind) for seq, (model, kind, _) in enumerate(drawn)]
    alone = {seq for seq, (_, _, apart) in enumerate(drawn) if apart}
    groups = train_groups(requests, alone)
    assert [r for group in groups for r in group] == requests
    for group in groups:
        assert len({r.header["model_id"] for r in group}) == len(group)
        assert len({r.header["forward_only"] for r in group}) == 1
        assert len(group) == 1 or not alone & {r.header["seq"] for r in group}
