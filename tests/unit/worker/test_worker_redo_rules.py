"""What a restarted worker runs again, what it says again, and who may take a lease back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tinker_hpc.errors import LeaseLostError
from tinker_hpc.log import Lease, Record
from tinker_hpc.worker import agent
from tinker_hpc.worker.metrics import MetricsFile, StepMetrics, read_metrics
from tinker_hpc.worker.redo import Redo
from tinker_hpc.worker.snapshot_files import Coverage


def request(op: str, seq: int = 1, **fields: Any) -> Record:
    return Record({"op": op, "seq": seq, "forward_only": False, **fields})


@pytest.mark.parametrize(
    ("asked", "again"),
    [
        (request("create_model"), True),
        (request("forward_backward"), True),
        (request("forward_backward", forward_only=True), False),
        (request("optim_step"), True),
        (request("load_state"), True),
        (request("open_sampler"), True),
        (request("save_sampler_weights", sampling_session_id="s"), True),
        (request("save_sampler_weights", folder="f"), False),
        (request("save_state"), False),
        (request("sample"), False),
    ],
)
def test_only_what_leaves_state_behind_runs_again(asked: Record, again: bool) -> None:
    redo = Redo()
    assert redo.must_run(asked), "not answered yet"
    redo.learn([Record({"op": asked.header["op"], "seq": 1, "ok": True})])
    assert redo.must_run(asked) is again and redo.error_of(asked) is None
    redo.learn([Record({"op": asked.header["op"], "seq": 1, "ok": False, "error": "e"})])
    assert not redo.must_run(asked) and redo.error_of(asked) == "e"


def test_answered_passes_run_again_beside_one_whose_answer_was_lost() -> None:
    redo = Redo(held=Coverage(4))
    answers = [{"op": "forward_backward", "seq": seq, "ok": seq != 8} | {"error": "e"} for seq in (1, 5, 8, 9)]
    redo.learn([Record(header) for header in answers])

    def again(*seqs: int) -> set[int]:
        return redo.together_with_new([[request("forward_backward", seq, forward_only=True) for seq in seqs]])

    assert again(5, 6) == {5}, "the answer to 6 was lost"
    assert again(5, 9) == set() == again(5), "nothing was"
    assert again(5, 6, 8) == {5}, "8 was refused: nothing was computed with it"
    assert again(1, 6) == set(), "the state holds 1: its gradients must not be added twice"


def test_batches_are_kept_in_order_and_notes_ignored() -> None:
    redo = Redo()
    redo.learn([Record({"op": "sealed", "limits": {}}), Record({"op": "worker_started"})])
    redo.learn([Record({"op": "batch", "seqs": [1, 2]}), Record({"op": "batch", "seqs": [3]})])
    assert list(redo.batches) == [[1, 2], [3]] and not redo.answered


def test_a_batch_that_was_interrupted_and_announced_again_counts_once() -> None:
    redo = Redo()
    redo.learn([Record({"op": "batch", "seqs": [1, 2]}), Record({"op": "batch", "seqs": [3, 4]})])
    redo.learn([Record({"op": "batch", "seqs": [4]}), Record({"op": "batch", "seqs": [5]})])  # the next worker
    assert list(redo.batches) == [[1, 2], [3, 4], [5]]


def test_a_load_from_another_checkpoint_is_noticed() -> None:
    redo = Redo()
    redo.learn([Record({"op": "load_state", "seq": 1, "ok": True, "checkpoint": ["r1", 5.0]})])
    assert redo.difference(request("load_state"), {"checkpoint": ["r1", 5.0]}) is None
    assert "overwritten" in (redo.difference(request("load_state"), {"checkpoint": ["r2", 6.0]}) or "")


def line(model_id: str, step: int, *, seq: int) -> dict[str, Any]:
    return StepMetrics().line(model_id, step, {"grad_norm:mean": 1.0}, 0.1, 0.5, seq=seq)


def test_metrics_lines_are_not_repeated_on_redo(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for seq, step in ((3, 1), (5, 2), (9, 3), (13, 2)):  # a load went back to step 1
        first.append(line("a", step, seq=seq))
    first.append(line("b", 1, seq=7))
    again = MetricsFile(path)
    for seq, step in ((9, 3), (13, 2), (15, 3)):  # from a snapshot on, which held the first two
        again.append(line("a", step, seq=seq))
    again.append(line("b", 1, seq=7)), again.append(line("b", 2, seq=17))
    assert [(x["model_id"], x["step"]) for x in read_metrics(path)] == [
        ("a", 1), ("a", 2), ("a", 3), ("a", 2), ("b", 1), ("a", 3), ("b", 2)
    ]  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_cut_short_by_a_kill_is_skipped_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(line("a", 1, seq=1))
    path.write_bytes(path.read_bytes() + b'{"model_id": "a", "st')
    MetricsFile(path).append(line("b", 1, seq=2))
    assert [x["model_id"] for x in read_metrics(path)] == ["a", "b"]


def test_sums_and_per_token_loss(tmp_path: Path) -> None:
    sums = StepMetrics()
    sums.add(loss_sum=6.0, num_loss_tokens=3, num_tokens=10, seconds=0.1)
    sums.add(loss_sum=2.0, num_loss_tokens=1, num_tokens=5, seconds=0.2)
    made = sums.line("a", 4, {"grad_norm:mean": float("nan")}, 0.1, 0.5, seq=9)
    assert (made["loss_per_token"], made["loss_sum"], made["num_tokens"], made["step"]) == (2.0, 8.0, 15, 4)
    assert made["pass_time_s"] == pytest.approx(0.3)
    assert StepMetrics().line("a", 1, {}, 0.1, 0.0, seq=1)["loss_per_token"] is None
    MetricsFile(tmp_path / "m").append(made)
    assert json.loads((tmp_path / "m").read_text())["grad_norm"] is None, "plain JSON, for any reader"


def test_a_superseded_agent_does_not_take_the_lease_back(tmp_path: Path) -> None:
    lease = tmp_path / "lease"
    agent.refuse_if_superseded(lease, "a")  # the first start of all
    Lease.acquire(lease, {"agent": "a", "pid": 1, "host": "x"})
    agent.refuse_if_superseded(lease, "a")  # restarted in place
    agent.refuse_if_superseded(lease, "b")  # a successor
    Lease.acquire(lease, {"agent": "b", "pid": 2, "host": "y"})
    agent.refuse_if_superseded(lease, "b")
    with pytest.raises(LeaseLostError, match="taken over by pid 2 on y"):
        agent.refuse_if_superseded(lease, "a")


def test_the_owner_names_this_process_and_its_parent() -> None:
    owner = agent.owner()
    assert owner["pid"] == os.getpid() and f":{os.getppid()}:" in owner["agent"]
    assert owner["agent"].rpartition(":")[2].isdigit()
