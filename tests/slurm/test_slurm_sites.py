"""Sites that do not let a job submit the next one: it is requeued instead, or one of a ladder of jobs goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from continued import Numbers, Recovery, nothing_left, numbers, preempt, status_of, train, wait_for_steps
from slurm_machine import SlurmCluster, until

pytestmark = pytest.mark.slow

POLICY = """
-- Jobs are submitted on login nodes, and what was submitted stays as it is.
function slurm_job_submit(job_desc, part_list, submit_uid)
    if string.match(job_desc.alloc_node or "", "^node") then
        slurm.log_user("jobs are submitted on the login node")
        return slurm.ERROR
    end
    return slurm.SUCCESS
end

function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
    if modify_uid ~= 0 then
        slurm.log_user("jobs are not changed here")
        return slurm.ERROR
    end
    return slurm.SUCCESS
end

return slurm.SUCCESS
"""
"""A site's job_submit.lua: https://slurm.schedmd.com/job_submit_plugins.html"""


def learned(cluster: SlurmCluster, name: str) -> dict[str, Any]:
    """What a job wrote down of a cluster profile; {} if nothing."""
    path = cluster.home("alice") / "tinker_hpc_data" / "sites" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def site(cluster: SlurmCluster, profile: str, begin: list[str], end: list[str]) -> Iterator[None]:
    """A change of Slurm's configuration; afterwards it is as before, and what a job learned is forgotten."""
    cluster.slurm("scontrol", *begin)
    try:
        yield
    finally:
        cluster.slurm("scontrol", *end)
        (cluster.home("alice") / "tinker_hpc_data" / "sites" / f"{profile}.json").unlink(missing_ok=True)


def test_sbatch_refused_on_compute_nodes(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """The partition takes jobs from the login node only: refused, the job has itself requeued, and writes that down."""
    part = ["update", "PartitionName=low"]
    with site(cluster, "low", [*part, "AllocNodes=login"], [*part, "AllocNodes=ALL"]):
        run = train(cluster, cluster="low", resources={"cpus_per_node": 8})
        wait_for_steps(cluster, run, 3)
        assert learned(cluster, "low")["continuation"] == "requeue"
        assert "permission denied" in learned(cluster, "low")["words"]
        recovery = Recovery(cluster, run, "preempted where a job may only requeue itself")
        preempt(cluster)
        recovery.wait()
        assert numbers(cluster, run) == unharmed
        assert status_of(cluster, run)["job_ids"] == [run["job_id"]], "the same job, started twice"


@pytest.mark.timeout(600)
def test_the_ladder(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """A policy of the site refuses both ways. The first job finds out; later runs are submitted with jobs behind them,
    of which one works at a time."""
    folder = cluster.base / "etc" / "slurm"
    before = (folder / "slurm.conf").read_text()
    (folder / "job_submit.lua").write_text(POLICY)
    (folder / "slurm.conf").write_text(f"{before}JobSubmitPlugins=lua\n")
    try:
        with site(cluster, "test", ["reconfigure"], ["ping"]):
            first = cluster.submit("true")
            assert "error" not in cluster.act("alice", "result", first["run_id"])
            assert learned(cluster, "test")["continuation"] == "ladder"
            words = learned(cluster, "test")["words"]
            assert "submitted on the login node" in words and "not changed here" in words
            assert len(status_of(cluster, first)["job_ids"]) == 1
            run = train(cluster, pause_s=1.0)
            jobs = status_of(cluster, run)["job_ids"]
            assert len(jobs) == 4
            for number, why in enumerate(("killed by root", "killed by root once more")):
                wait_for_steps(cluster, run, 3 * (number + 1))
                states = cluster.slurm("squeue", "-h", "-n", run["run_id"], "-o", "%T %r").splitlines()
                assert sorted(states) == ["PENDING Dependency"] * (3 - number) + ["RUNNING None"]
                recovery = Recovery(cluster, run, f"one of a ladder {why}")
                cluster.slurm("scancel", "-s", "KILL", "-f", jobs[number])
                recovery.wait()
            assert numbers(cluster, run) == unharmed
            assert status_of(cluster, run)["job_ids"] == jobs
            nothing_left(cluster, run)
            cancelled = train(cluster, pause_s=5.0)
            wait_for_steps(cluster, cancelled, 1)
            cluster.act("alice", "cancel", cancelled["run_id"])
            assert cluster.act("alice", "result", cancelled["run_id"])["error"] == "JobCancelledError"
            until(lambda: not cluster.slurm("squeue", "-h").strip(), timeout_s=60, what="the end of every rung")
    finally:
        (folder / "slurm.conf").write_text(before)
        (folder / "job_submit.lua").unlink()
        cluster.slurm("scontrol", "reconfigure")
