"""While a worker waits, its pending futures and `tinker-hpc status` say why and since when, with the stock SDK."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from slurm_machine import TINY_MODEL, SlurmCluster, until


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_why_a_future_waits(cluster: SlurmCluster) -> None:
    """Not its time yet; held by the user, by an administrator; the controller away and back; and then it runs."""
    told = cluster.home("alice") / "waits.jsonl"

    def lines(key: str) -> list[str]:
        if not told.exists():
            return []
        found = [json.loads(line) for line in told.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [line[key] for line in found if key in line]

    def hears(*words: str) -> str:
        """The SDK's patience with one question is 40 s, the keeper asks Slurm every 30 s."""
        return until(
            lambda: next((why for why in reversed(lines("why")) if all(word in why for word in words)), None),
            timeout_s=150,
            what=f"{words} in what the SDK is told: {lines('why')[-3:]}",
        )

    def status() -> str:
        return cluster.as_user("alice", sys.executable, "-m", "tinker_hpc.cli", "status", run_id).stdout

    with ThreadPoolExecutor(1) as pool:
        argv = (str(TINY_MODEL), "later", str(told))
        notebook = pool.submit(cluster.program, "alice", "waiting_session.py", *argv, timeout_s=800)
        try:
            why = hears("Slurm PENDING (BeginTime), estimated start", "its start time is not reached", ", since ")
            runs = cluster.home("alice") / "tinker_hpc_data" / "runs"
            run_id = max(runs.glob("waits-*")).name
            job_id = json.loads((runs / run_id / "submitted.json").read_text())["job_id"]
            assert f"job {job_id}" in why
            assert "BeginTime: its start time is not reached" in status() and "queued since" in status()
            assert cluster.as_user("alice", "scontrol", "hold", job_id).returncode == 0
            hears("JobHeldUser", f", job {job_id}: held; `scontrol release {job_id}` lets it go")
            cluster.slurm("scontrol", "hold", job_id)
            hears("JobHeldAdmin", "held by an administrator")
            assert "JobHeldAdmin: held by an administrator" in status()
            cluster.script("daemon", "stop", "slurmctld")
            hears(f"Slurm does not say how job {job_id} is", "before that: Slurm PENDING (JobHeldAdmin)")
            cluster.script("daemon", "start", "slurmctld")
            cluster.slurm("scontrol", "update", f"JobId={job_id}", "StartTime=now")
            cluster.slurm("scontrol", "release", job_id)
            until(
                lambda: lines("state")[-1] == "active" or "runs on node" in lines("why")[-1], timeout_s=150, what="it"
            )
            assert any("is paused. Reason: Slurm PENDING" in line for line in lines("logged")), "the SDK's own log"
        finally:
            told.with_name(f"{told.name}.stop").touch()
            notebook.result()
