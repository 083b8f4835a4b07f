"""Sessions on a real Slurm: the worker is a job, the client and its gateway are on the login node."""

from __future__ import annotations

import json

from slurm_machine import TINY_MODEL, SlurmCluster, until


def end_of(cluster: SlurmCluster, job_id: str) -> str:
    """State of a job in accounting, once it has ended."""

    def ended() -> str:
        row = cluster.sacct(job_id, "State")
        return row[0] if row and row[0] not in ("PENDING", "RUNNING", "COMPLETING") else ""

    return until(ended, timeout_s=60, what=f"the end of job {job_id} in accounting")


def test_a_notebook_trains_in_a_job_that_ends_with_it(cluster: SlurmCluster) -> None:
    answer = cluster.program("alice", "session_loop.py", str(TINY_MODEL), timeout_s=280)
    assert answer["loss"] > 0 and 1 <= answer["num_tokens"] <= 4
    job_id = json.loads((cluster.run_folder(answer["run_id"]) / "submitted.json").read_text())["job_id"]
    assert end_of(cluster, job_id) == "COMPLETED"
    status = cluster.act("alice", "status", answer["run_id"])
    assert (status["kind"], status["state"], status["slurm_state"]) == ("session", "COMPLETED", "COMPLETED")


def test_serve_answers_while_its_job_waits_and_cancels_it_at_the_end(cluster: SlurmCluster) -> None:
    answer = cluster.program("alice", "serve_and_stop.py", str(TINY_MODEL), "later", timeout_s=150)
    waiting = answer["waiting"]
    assert waiting["phase"] == "queued" and answer["job_id"] in waiting["reason"]
    assert waiting["reason"].startswith("Slurm PENDING (BeginTime), estimated start")
    assert (answer["exit_code"], answer["phase"], answer["left"]) == (0, "ended", "")
    assert end_of(cluster, answer["job_id"]).startswith("CANCELLED")
