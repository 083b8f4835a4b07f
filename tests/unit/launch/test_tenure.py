"""What a job asks Slurm when it takes a run, and what it must not ask when it leaves within a preemption's grace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import attempts
from launch.chain import SCANCELLED
from launch.host import CommandResult
from launch.job_spec import JobSpec
from launch.node import Place
from launch.run_record import RunRecord
from launch.submitted import SubmittedJob
from launch.tenure import Tenure
from tinker_hpc.config import ClusterProfile
from tinker_hpc.private_files import make_private, write_json
from tinker_hpc.run_folder import RunFolder


class Slurm:
    """A host that counts what it is asked. Accounting says that the job before this one lost its node."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self.asked: list[str] = []

    def run(self, argv: Sequence[str], *, timeout_s: float = 60.0) -> CommandResult:
        self.asked.append(argv[0])
        out = {"sbatch": "12", "sacct": f"10|{self._run_id}|NODE_FAIL|0:0|1|2|3|1|n1|||"}.get(argv[0], "")
        return CommandResult(tuple(argv), 0, out + "\n", "")


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    """A run whose first job, 10, is gone; it has left no note."""
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    folder = RunFolder.new(root, "r")
    write_json(folder.submitted, SubmittedJob("10", "della", 0.0, folder.run_id, "slurm", str(folder.path)).to_json())
    (make_private(folder.slurm) / "10_submitted.pkl").write_bytes(b"pickle")
    attempts.begin(folder, {"job_id": "10", "host": "n1", "pid": 1})
    (folder.attempts / "alive-000001").unlink()
    return folder


def second_job(folder: RunFolder) -> tuple[Tenure, Slurm]:
    spec = JobSpec(folder.run_id, "run", "r", "m", "/m", ClusterProfile("della"))
    slurm = Slurm(folder.run_id)
    return Tenure(spec, folder, Place("11", 0, "n1", "slurm"), RunRecord(folder, writes_status=False), slurm), slurm


def leaves(tenure: Tenure, slurm: Slurm) -> list[str]:
    """What Slurm is asked until the rule has spoken: the ranks wait for that with putting their state away."""
    slurm.asked.clear()
    assert tenure.after("preempted", "preempted by a job of higher priority", 143).goes_on
    return slurm.asked


@pytest.mark.parametrize("reason", ["preempted", "time_limit"])
def test_a_job_that_left_a_note_is_not_asked_about(run_folder: RunFolder, reason: str) -> None:
    attempts.end(run_folder, 1, reason=reason, error=None, exit_code=143, progressed=True)
    tenure, slurm = second_job(run_folder)
    assert tenure.take() is None and "sacct" not in slurm.asked
    assert leaves(tenure, slurm) == []


@pytest.mark.parametrize("note", [None, SCANCELLED])
def test_what_accounting_said_once_is_kept(run_folder: RunFolder, note: str | None) -> None:
    if note is not None:
        attempts.end(run_folder, 1, reason=note, error=None, exit_code=143, progressed=False)
    tenure, slurm = second_job(run_folder)
    assert tenure.take() is None and slurm.asked.count("sacct") == 1
    assert '"after": "node_fail"' in run_folder.events.read_text()
    assert leaves(tenure, slurm) == []
