"""Slurm itself is away, holds a job back, or is told to end it by whoever may: the run waits, goes on, or ends."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from continued import (
    TIMES,
    Numbers,
    Recovery,
    nothing_left,
    numbers,
    queue,
    redone,
    status_of,
    steps,
    train,
    wait_for_steps,
)
from slurm_machine import SlurmCluster, until

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_slurm_itself_is_away(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Controller and accounting down while the run trains, and a job lost while accounting is away."""
    away(cluster, unharmed, seconds=12)


@pytest.mark.slow
def test_slurmctld_down_for_two_minutes(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """The same for as long as a controller that is moved to another machine is away."""
    away(cluster, unharmed, seconds=120)


def away(cluster: SlurmCluster, unharmed: Numbers, *, seconds: float) -> None:
    run = train(cluster, program="paced_loop.py", pause_s=max(1.0, seconds / 12))
    wait_for_steps(cluster, run, 2)
    cluster.script("daemon", "stop", "slurmctld")
    before = steps(cluster, run)
    time.sleep(seconds)
    until(lambda: steps(cluster, run) - before >= 3, timeout_s=120, what="steps: the run does not need the controller")
    during = steps(cluster, run) - before
    cluster.script("daemon", "start", "slurmctld")
    TIMES.append(f"   0.0 s  slurmctld down for {seconds:.0f} s: {during} steps were made meanwhile")
    cluster.script("daemon", "stop", "slurmdbd")
    try:
        answers = lambda: "UP" in cluster.script("exec", "scontrol", "ping", check=False).stdout  # noqa: E731
        until(answers, timeout_s=60, what="slurmctld")
        recovery = Recovery(cluster, run, "job cancelled by root while slurmdbd is down")
        until(
            lambda: cluster.script("exec", "scancel", run["job_id"], check=False).returncode == 0,
            timeout_s=60,
            what="scancel",
        )
        recovery.wait()
    finally:
        cluster.script("daemon", "start", "slurmdbd")
    assert numbers(cluster, run) == unharmed


def test_held_and_released_and_cancelled(cluster: SlurmCluster) -> None:
    """A successor that is held says so; a user's cancel ends the job and all that would follow it.

    And of another run Slurm knows whose scancel it was: the next job finds the owner's, says so, and ends.
    """
    scancelled = train(cluster, pause_s=5.0)
    run = train(cluster, pause_s=5.0)
    wait_for_steps(cluster, run, 1)
    until(lambda: len(status_of(cluster, run)["job_ids"]) == 2, timeout_s=60, what="the successor")
    successor = status_of(cluster, run)["job_ids"][1]
    cluster.slurm("scontrol", "hold", successor)
    recovery = Recovery(cluster, run, "cancelled by root, the successor held for some seconds")
    cluster.slurm("scancel", run["job_id"])
    waiting = until(
        lambda: (s := status_of(cluster, run))["state"] == "PENDING" and "JobHeld" in s["reason"] and s,
        timeout_s=60,
        what="the reason the run waits",
    )
    assert waiting["job_id"] == successor
    wait_for_steps(cluster, scancelled, 1)
    assert cluster.as_user("alice", "scancel", scancelled["job_id"]).returncode == 0
    cluster.slurm("scontrol", "release", successor)
    recovery.wait()
    cluster.act("alice", "cancel", run["run_id"])
    result = cluster.act("alice", "result", run["run_id"])
    assert result["error"] == "JobCancelledError"
    nothing_left(cluster, run)
    num_jobs = len(status_of(cluster, run)["job_ids"])
    result = cluster.act("alice", "result", scancelled["run_id"])
    assert result["error"] == "JobCancelledError" and "scancel" in result["message"]
    nothing_left(cluster, scancelled)
    time.sleep(5.0)
    assert run["run_id"] not in queue(cluster) and len(status_of(cluster, run)["job_ids"]) == num_jobs


@pytest.mark.slow
def test_resumed_after_a_cancel(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Cancelled, resumed with DP 2 over two nodes, cancelled there and resumed on one rank again: what was computed is
    not computed again, and the run goes on as it would have, as far as other layouts allow (1e-5)."""
    run = train(cluster, pause_s=1.5)
    wait_for_steps(cluster, run, 3)
    refused = cluster.act("alice", "resume", run["run_id"])
    assert refused["error"] == "ConfigError" and "not over" in refused["message"]
    for num_nodes in (2, 1):
        cluster.act("alice", "cancel", run["run_id"])
        assert cluster.act("alice", "result", run["run_id"])["error"] == "JobCancelledError"
        nothing_left(cluster, run)
        recovery = Recovery(cluster, run, f"cancelled, then resumed with DP {num_nodes} on as many nodes")
        sizes = {"nodes": num_nodes, "ranks_per_node": 1, "memory": "2G"}
        assert "error" not in cluster.act("alice", "resume", run["run_id"], json.dumps({"resources": sizes}))
        recovery.wait()
    resumed = numbers(cluster, run)
    assert redone(cluster, run) == [0, 0], "each job that was cancelled put its state away, on every node"
    assert resumed.losses == pytest.approx(unharmed.losses, rel=1e-5)
    assert resumed.tensors.keys() == unharmed.tensors.keys()
    for name, values in resumed.tensors.items():
        np.testing.assert_allclose(values, unharmed.tensors[name], rtol=1e-5, atol=1e-5, err_msg=name)
