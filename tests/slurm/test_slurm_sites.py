"""Sites that do not let a job submit the next one: it is requeued instead, or one of a ladder of jobs goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from continued import Numbers, Recovery, nothing_left, numbers, preempt, status_of, train, wait_for_steps
from slurm_machine import SlurmCluster

pytestmark = pytest.mark.slow

_NO_SBATCH = """
-- Jobs are submitted on login nodes. alloc_node is "localhost" on every machine of this test cluster, and our sbatch
-- hands no variable of its job on; what a job submits waits for that job to fail, which nothing from outside does.
function slurm_job_submit(job_desc, part_list, submit_uid)
    if string.find(job_desc.dependency or "", "afternotok") then
        slurm.log_user("sbatch works on login nodes only")
        return slurm.ERROR
    end
    return slurm.SUCCESS
end
"""
_ANY_CHANGE = """
function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
    return slurm.SUCCESS
end
"""
_NO_CHANGE = """
-- What was submitted stays as it is.
function slurm_job_modify(job_desc, job_rec, part_list, modify_uid)
    return modify_uid == 0 and slurm.SUCCESS or slurm.ERROR
end
"""


def learned(cluster: SlurmCluster, name: str) -> dict[str, Any]:
    """What a job wrote down of a cluster profile; {} if nothing."""
    path = cluster.home("alice") / "tinker_hpc_data" / "sites" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def site(cluster: SlurmCluster, profile: str, *policy: str) -> Iterator[None]:
    """A site's job_submit.lua (https://slurm.schedmd.com/job_submit_plugins.html). Afterwards Slurm is as before, and
    what a job learned of the site is forgotten."""
    folder = cluster.base / "etc" / "slurm"
    before = (folder / "slurm.conf").read_text()
    (folder / "job_submit.lua").write_text("\n".join([*policy, "return slurm.SUCCESS", ""]))
    (folder / "slurm.conf").write_text(f"{before}JobSubmitPlugins=lua\n")
    cluster.slurm("scontrol", "reconfigure")
    try:
        yield
    finally:
        (folder / "slurm.conf").write_text(before)
        cluster.slurm("scontrol", "reconfigure")
        (folder / "job_submit.lua").unlink()
        (cluster.home("alice") / "tinker_hpc_data" / "sites" / f"{profile}.json").unlink(missing_ok=True)


def test_sbatch_refused_on_compute_nodes(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """The job finds out by being refused, has itself requeued instead, and writes down what it learned."""
    with site(cluster, "low", _NO_SBATCH, _ANY_CHANGE):
        run = train(cluster, cluster="low", resources={"cpus_per_node": 8})
        wait_for_steps(cluster, run, 3)
        assert learned(cluster, "low")["continuation"] == "requeue"
        assert "sbatch works on login nodes only" in learned(cluster, "low")["words"]
        recovery = Recovery(cluster, run, "preempted where a job may only requeue itself")
        preempt(cluster)
        recovery.wait()
        assert numbers(cluster, run) == unharmed
        assert status_of(cluster, run)["job_ids"] == [run["job_id"]], "the same job, started twice"


@pytest.mark.timeout(900)
def test_the_ladder(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """A policy of the site refuses both ways. The first job finds out; later runs are submitted with jobs behind them,
    of which one works at a time. Two are killed, the third ends the run and the fourth goes; a cancel takes all."""
    with site(cluster, "test", _NO_SBATCH, _NO_CHANGE):
        first = cluster.submit("true")
        assert "error" not in cluster.act("alice", "result", first["run_id"])
        assert learned(cluster, "test")["continuation"] == "ladder"
        assert "sbatch works on login nodes only" in learned(cluster, "test")["words"]
        assert len(status_of(cluster, first)["job_ids"]) == 1

        run = train(cluster, pause_s=1.0)
        jobs = status_of(cluster, run)["job_ids"]
        assert len(jobs) == 4
        for number in range(2):
            wait_for_steps(cluster, run, 3 * (number + 1))
            states = cluster.slurm("squeue", "-h", "-n", run["run_id"], "-t", "PD,R", "-o", "%T %r").splitlines()
            assert sorted(states) == ["PENDING Dependency"] * (3 - number) + ["RUNNING None"]
            recovery = Recovery(cluster, run, f"job {number + 1} of a ladder killed by root")
            cluster.slurm("scancel", "-s", "KILL", "-f", jobs[number])
            recovery.wait()
        assert numbers(cluster, run) == unharmed
        assert status_of(cluster, run)["job_ids"] == jobs
        nothing_left(cluster, run)

        cancelled = train(cluster, pause_s=5.0)
        wait_for_steps(cluster, cancelled, 1)
        cluster.act("alice", "cancel", cancelled["run_id"])
        assert cluster.act("alice", "result", cancelled["run_id"])["error"] == "JobCancelledError"
        nothing_left(cluster, cancelled)
