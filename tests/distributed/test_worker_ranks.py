"""Rank 0's word reaches all, and all agree on what failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_models
from gloo_launcher import run_ranks

from megatron_adapters.interface import Layout
from tinker_hpc.log import Record
from tinker_hpc.worker.poison import leave_note, read_notes
from tinker_hpc.worker.ranks import Failure

pytestmark = pytest.mark.distributed


def test_ranks_talk_and_agree(tmp_path: Path) -> None:
    written = run_ranks("worker_rank_scenarios:talk", 2, tmp_path / "run", make(tmp_path / "out"))
    seen = [eval(written[str(rank)], {"Failure": Failure, "inf": float("inf")}) for rank in range(2)]
    for mine in seen:
        assert mine["records"] == [({"command": "x", "loss": float("inf")}, {"a": [0, 1, 2, 3, 4]}), ({}, {})]
        assert mine["nothing"] == [] and mine["all well"] is None
        assert mine["all failed"] == Failure("user", "rank 0 says no")
        assert mine["result"] == {"rank": 0}
        names, messages = zip(*mine["errors"], strict=True)
        assert names == ("RequestError", "DataRootError", "RuntimeError")
        assert messages[0] == "bad" and "No space left" in messages[1] and "KeyError: 'x'" in messages[2]
        assert mine["apart"] == ("rank 1 of 2 failed alone: only here", Failure("server", "only here"))
        assert mine["all out of memory"] == Failure("server", "no room", out_of_memory=True)
        message, failure = mine["not in place"]
        assert message == "all ranks ran out of memory while they computed together: no room"
        assert failure == Failure("server", "no room", out_of_memory=True), "so the batch is cut next time"
    assert seen[1]["alone"] == ("rank 1 failed alone: the others hang", Failure("server", "the others hang"))
    assert "alone" not in seen[0]
    message, failure = seen[0]["widowed"]
    assert message.startswith("another rank ended") and failure is None, "its request is run again, not failed"


def test_a_rank_ends_in_good_order_while_a_collective_is_under_way(tmp_path: Path) -> None:
    """By Python's own end it would abort: a gloo thread lets go of a tensor while the interpreter is taken down."""
    assert run_ranks("worker_rank_scenarios:end_in_the_middle", 2, tmp_path) == 200


@pytest.mark.parametrize(
    ("family", "layout", "backward"),
    [
        pytest.param("qwen3", Layout(pp_size=2), False, id="PP2"),  # the other is done, and waits to share results
        pytest.param("qwen3_moe", Layout(dp_size=2, ep_size=2), True, id="EP2"),  # it waits for tokens
    ],
)
def test_one_that_runs_out_of_memory_ends_soon_and_says_so(
    family: str, layout: Layout, backward: bool, tmp_path: Path
) -> None:
    """So the budget note is left, and the batch is cut when all have started again (worker/loop.py)."""
    base = random_models.make(family, tmp_path / "base")
    arguments = (base, layout, backward, make(tmp_path / "out"))
    found = run_ranks("worker_rank_scenarios:run_out_alone", 2, tmp_path / "run", *arguments)
    assert found[1] == ("rank 1 failed alone: MemoryError: no room", True)
    assert found[0][0].startswith("another rank ended") and found[0][1] is None, found[0]


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_notes_on_requests_that_break_a_rank(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == {}
    failure = Failure("server", "CUDA out of memory")
    leave_note(tmp_path, [Record({"seq": 7}), Record({"seq": 12})], failure)
    assert read_notes(tmp_path) == {7: failure, 12: failure}
