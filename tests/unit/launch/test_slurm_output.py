"""What Slurm prints, recorded from a real 22.05.8 by tests/golden/record_slurm.sh, and what we make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import sacct, scontrol, squeue
from launch.host import CommandResult
from launch.job_state import JobState, job_state
from launch.slurm_fields import duration_s, exit_and_signal, gpu_count, memory_bytes, node_names

RECORDED = Path(__file__).parents[2] / "golden" / "slurm-22.05"

# The fate of each recorded job, by its name, as we know it from how it was made.
FATES = {
    "limit": JobState.TIMEOUT,
    "two-nodes": JobState.COMPLETED,
    "exit-3": JobState.FAILED,
    "exit-143": JobState.FAILED,
    "cancelled": JobState.CANCELLED,
    "cancelled-pending": JobState.CANCELLED,
    "begin-later": JobState.PENDING,
    "too-many-nodes": JobState.PENDING,
    "requeued": JobState.COMPLETED,
    "node-fail": JobState.NODE_FAIL,
}


def text(name: str) -> str:
    return (RECORDED / name).read_text()


def test_squeue_knows_every_fate() -> None:
    rows = {row.name: row.status for row in squeue.parse(text("squeue.txt"))}
    # squeue sees only a failed srun where accounting sees the step's out-of-memory.
    assert {name: status.state for name, status in rows.items()} == {**FATES, "step-oom": JobState.FAILED}
    assert rows["two-nodes"].nodes == ("node1", "node2")
    assert rows["two-nodes"].elapsed_s == 4
    assert rows["two-nodes"].end is not None and rows["two-nodes"].start is not None
    assert rows["two-nodes"].end - rows["two-nodes"].start == 4
    assert (rows["begin-later"].reason, rows["too-many-nodes"].reason) == ("BeginTime", "PartitionConfig")
    assert rows["begin-later"].start is None and rows["begin-later"].estimated_start is not None
    assert rows["too-many-nodes"].estimated_start is None
    assert rows["cancelled-pending"].start is None, "it never ran, though squeue prints a start time"


def test_sacct_knows_every_fate() -> None:
    rows = {row.name: row.status for row in sacct.parse(text("sacct.txt"))}
    assert {name: status.state for name, status in rows.items()} == {**FATES, "step-oom": JobState.OUT_OF_MEMORY}
    assert rows["cancelled"].slurm_state == "CANCELLED by 2001"
    assert (rows["exit-3"].exit_code, rows["exit-3"].signal) == (3, None)
    assert rows["exit-143"].exit_code == 15, "sacct masks exit codes with 0x7f; 143 shows as 15"
    assert rows["begin-later"].exit_code is None, "a job that has not ended has no exit code, whatever sacct prints"
    assert rows["two-nodes"].reason == "" and rows["requeued"].reason == "", "the reason it once waited for is stale"
    assert rows["cancelled-pending"].start is None and rows["cancelled-pending"].elapsed_s is None
    # The same job, as accounting also shows it now and then.
    line = "9|cancelled-pending|CANCELLED by 2001|0:0|1795471232|1795471237|1795471237|0|None assigned|||BeginTime"
    [row] = sacct.parse(line)
    assert row.status.start is None and row.status.elapsed_s is None


def test_sacct_counts_what_was_used() -> None:
    rows = {row.name: row.status for row in sacct.parse(text("sacct.txt"))}
    two_nodes = rows["two-nodes"]
    assert two_nodes.gpu_hours == pytest.approx(4 * 4 / 3600), "2 nodes x 2 GPUs x 4 s"
    assert two_nodes.peak_memory_gib == pytest.approx(10720 / 2**20), "the largest step, 10720K"
    assert rows["limit"].gpu_hours == 0.0
    assert rows["begin-later"].gpu_hours is None, "not known is not zero"


def test_sacct_of_a_requeued_job_keeps_its_records_apart() -> None:
    records = [row.status for row in sacct.parse(text("sacct.txt")) if row.name == "requeued"]
    assert [record.slurm_state for record in records] == ["REQUEUED", "COMPLETED"]
    assert records[0].peak_memory_gib == pytest.approx(3124 / 2**20)
    assert records[1].peak_memory_gib == pytest.approx(3332 / 2**20)


def test_scontrol_knows_every_fate() -> None:
    parsed = [scontrol.parse(line) for line in text("scontrol.txt").splitlines()]
    rows = dict(entry for entry in parsed if entry is not None)
    assert {name: status.state for name, status in rows.items()} == {**FATES, "step-oom": JobState.FAILED}
    assert rows["exit-143"].exit_code == 143, "scontrol does not mask"
    assert rows["two-nodes"].gpu_hours == pytest.approx(4 * 4 / 3600)
    assert rows["limit"].reason == "TimeLimit" and rows["limit"].elapsed_s == 89
    assert rows["begin-later"].start is None and rows["begin-later"].exit_code is None


def test_who_ended_a_job_that_was_sent_term() -> None:
    lines = {line.split("JobName=")[1].split()[0]: line for line in text("scontrol.txt").splitlines()}
    assert scontrol.ending_reason(lines["limit"]) == "time_limit"
    assert scontrol.ending_reason(lines["cancelled"]) == "cancelled"
    running = lines["two-nodes"].replace("JobState=COMPLETED", "JobState=RUNNING")
    assert scontrol.ending_reason(running) is None
    # As 22.05 prints it from the moment a job of higher priority wants the nodes.
    preempted = running.replace(
        "SuspendTime=None", "PreemptEligibleTime=1795471233 PreemptTime=1795471240 SuspendTime=None"
    )
    assert scontrol.ending_reason(preempted) == "preempted"
    assert scontrol.ending_reason(running.replace("SuspendTime=None", "PreemptTime=None SuspendTime=None")) is None


def test_other_lines_are_no_rows() -> None:
    banner = "*** maintenance on Friday ***\n"
    assert squeue.parse(banner) == [] and sacct.parse(banner) == [] and scontrol.parse(banner) is None
    assert squeue.parse("") == [] and scontrol.parse("") is None


def test_sacct_without_accounting() -> None:
    # Recorded: rc 1 and this text, from a cluster with accounting_storage/none.
    silent = CommandResult(("sacct",), 1, "", "Slurm accounting storage is disabled\n")
    down = CommandResult(("sacct",), 1, "", "sacct: error: Problem talking to the database: Connection refused\n")
    assert sacct.no_accounting(silent) and not sacct.no_accounting(down)


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("CANCELLED by 2001", JobState.CANCELLED),
        ("CANCELLED+", JobState.CANCELLED),
        ("cancelled", JobState.CANCELLED),
        ("SUSPENDED", JobState.RUNNING),
        ("COMPLETING", JobState.RUNNING),
        ("CONFIGURING", JobState.RUNNING),
        ("REQUEUED", JobState.PENDING),
        ("SPECIAL_EXIT", JobState.PENDING),
        ("DEADLINE", JobState.TIMEOUT),
        ("BOOT_FAIL", JobState.NODE_FAIL),
        ("OUT_OF_ME+", JobState.UNKNOWN),
        ("EXPEDITING", JobState.UNKNOWN),
        ("", JobState.UNKNOWN),
        ("  ", JobState.UNKNOWN),
    ],
)
def test_job_state_goes_by_the_first_word(words: str, state: JobState) -> None:
    assert job_state(words) is state


def test_unknown_is_neither_running_nor_finished() -> None:
    assert not JobState.UNKNOWN.finished and not JobState.UNKNOWN.ok
    assert JobState.LOST.finished and not JobState.LOST.ok
    assert [state for state in JobState if state.ok] == [JobState.COMPLETED]


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("node1", ("node1",)),
        ("node[1-2,4]", ("node1", "node2", "node4")),
        ("gpu[08-10],cpu1", ("gpu08", "gpu09", "gpu10", "cpu1")),
        ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
        ("None assigned", ()),
        ("", ()),
    ],
)
def test_node_names(listed: str, names: tuple[str, ...]) -> None:
    assert node_names(listed) == names


def test_single_values() -> None:
    assert [duration_s(v) for v in ("0:04", "1:02:03", "2-01:02:03", "89", "UNLIMITED")] == [4, 3723, 176523, 89, None]
    assert [exit_and_signal(v) for v in ("3:0", "0:15", "", "0:125")] == [(3, None), (0, 15), (None, None), (0, 125)]
    assert [memory_bytes(v) for v in ("10720K", "1.5G", "0", "")] == [10720 * 1024, 3 * 2**29, 0, None]
    assert [gpu_count(v) for v in ("cpu=1,gres/gpu:a100=4,gres/gpu=4", "gres/gpu:a100=2,gres/gpu:h100=1", "")] == [
        4,
        3,
        0,
    ]
