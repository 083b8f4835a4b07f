"""Jobs die, the run lives: every way a job is ended from outside, on a real Slurm, with the time to recover."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from continued import (
    STEPS,
    Numbers,
    Recovery,
    end_of,
    kill_processes,
    nothing_left,
    numbers,
    numbers_of,
    preempt,
    redone,
    settled,
    status_of,
    steps,
    train,
    wait_for_steps,
)
from slurm_machine import TINY_MODEL, SlurmCluster, until

pytestmark = pytest.mark.timeout(900)
"""Several recoveries in one test, each a start of a worker: minutes on a busy machine."""


def test_preempted_with_grace(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """A job of a higher partition takes the node; ours ends within its grace, its successor waits and goes on."""
    run = train(cluster, cluster="low", resources={"cpus_per_node": 8})
    wait_for_steps(cluster, run, 3)
    waiting = cluster.slurm("squeue", "-h", "-n", run["run_id"], "-t", "PD", "-o", "%A %r %E")
    assert "Dependency" in waiting and f"afternotok:{run['job_id']}" in waiting, "the successor was there before"
    recovery = Recovery(cluster, run, "preempted, partition in requeue mode, grace 5 s")
    preempt(cluster)
    recovery.wait()
    assert numbers(cluster, run) == unharmed
    status = status_of(cluster, run)
    assert status["state"] == "COMPLETED" and status["job_ids"][0] == run["job_id"] and len(status["job_ids"]) == 3
    nothing_left(cluster, run)


@pytest.mark.slow
def test_preempted_without_grace(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Cancel mode and no grace: killed at once, without a word. Afterwards Slurm says why, and so does the record."""
    cluster.slurm("scontrol", "update", "PartitionName=low", "PreemptMode=CANCEL", "GraceTime=0")
    try:
        run = train(cluster, cluster="low", resources={"cpus_per_node": 8})
        wait_for_steps(cluster, run, 3)
        recovery = Recovery(cluster, run, "preempted, partition in cancel mode, no grace")
        preempt(cluster)
        recovery.wait()
        assert numbers(cluster, run) == unharmed
    finally:
        cluster.slurm("scontrol", "update", "PartitionName=low", "PreemptMode=REQUEUE", "GraceTime=5")


def ready_after_s(cluster: SlurmCluster, run: dict[str, str]) -> float:
    """Seconds from the beginning of a run's first job until its worker took requests."""
    lines = (cluster.run_folder(run["run_id"]) / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    first = {
        name: next(event["time"] for event in events if event["event"] == name) for name in ("started", "worker_ready")
    }
    return first["worker_ready"] - first["started"]


def test_time_limit(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Work stops before the limit, and the next job goes on; one that got nothing done ends at its limit; a third can
    never start. All at once, because Slurm's finest limit is a minute, looked at every half minute."""
    in_vain = cluster.submit("sleep", "600", resources={"time": 1, "cpus_per_node": 1})
    too_big = cluster.submit("true", resources={"nodes": 9})
    run = train(cluster, resources={"time": 1}, program="paced_loop.py", pause_s=2.2)
    until(
        lambda: "handed_over" in cluster.events(run["run_id"]), timeout_s=90, what="the handover before the time limit"
    )
    recovery = Recovery(cluster, run, "handed over before the time limit")
    assert cluster.sacct(run["job_id"], "State") != ["TIMEOUT"]
    recovery.wait()
    assert numbers(cluster, run) == unharmed
    if ready_after_s(cluster, run) < 45:  # else the minute was too short for a last snapshot
        assert redone(cluster, run)[0] == 0, "the job before put its state away: nothing was computed twice"

    result = cluster.act("alice", "result", in_vain["run_id"])
    assert result["error"] == "JobTimeLimitError"
    assert "1 min" in result["message"] and "`time`" in result["message"]
    assert end_of(cluster, in_vain["job_id"])[0] == "TIMEOUT"
    outcome = json.loads((cluster.run_folder(in_vain["run_id"]) / "outcome.json").read_text())
    assert (outcome["reason"], outcome["exit_code"]) == ("time_limit", 143), "the supervisor asked Slurm why"
    assert cluster.events(in_vain["run_id"]).count("signal") == 2, "USR2 announced it, TERM ended it"
    assert settled(cluster, in_vain["run_id"])["slurm_state"] == "TIMEOUT"

    status = status_of(cluster, too_big)
    assert (status["state"], status["reason"], status["start"]) == ("PENDING", "PartitionNodeLimit", None)


@pytest.mark.slow
def test_a_node_vanishes(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Power off: no signal, no goodbye, and Slurm needs its SlurmdTimeout (10 s here, 300 by default) to notice."""
    run = train(cluster)
    wait_for_steps(cluster, run, 3)
    node = status_of(cluster, run)["nodes"][0]
    recovery = Recovery(cluster, run, "node powered off, SlurmdTimeout 10 s")
    cluster.script("poweroff", node)
    recovery.wait()
    assert numbers(cluster, run) == unharmed
    assert len(status_of(cluster, run)["job_ids"]) == 3


@pytest.mark.slow
def test_a_node_is_only_unreachable(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Its slurmd is dead, its processes are not: Slurm starts the next job while the old one still works."""
    run = train(cluster, pause_s=2.0)
    wait_for_steps(cluster, run, 3)
    node = status_of(cluster, run)["nodes"][0]
    recovery = Recovery(cluster, run, "slurmd dead, processes alive, SlurmdTimeout 10 s")
    cluster.script("daemon", "kill", node)
    recovery.wait()
    events = cluster.events(run["run_id"])
    assert "superseded" in events, "the old job saw the new one's claim and ended what it had started"
    left = cluster.script("sh", node, "pgrep", "-f", f"-m tinker_hpc.*{run['run_id']}", check=False).stdout
    assert left == "", f"still running on {node}: {left}"
    assert numbers(cluster, run) == unharmed


def test_killed_one_by_one(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Rank, agent, gateway, loop: each is replaced in place, the queue never hears of it. Then the supervisor."""
    run = train(cluster, program="steady_loop.py", pause_s=1.0)
    worker = str(cluster.run_folder(run["run_id"]) / "workers")
    victims = {
        "rank": f"-m tinker_hpc.worker --worker-dir {worker}",
        "agent": f"torch.distributed.run.*{worker}",
        "gateway": f"tinker_hpc.gateway.*{run['run_id']}",
        "loop": "steady_loop.py",
    }
    wait_for_steps(cluster, run, 1)
    node = status_of(cluster, run)["nodes"][0]
    for who, pattern in victims.items():
        wait_for_steps(cluster, run, steps(cluster, run) + 1)
        recovery = Recovery(cluster, run, f"{who} killed", in_place=who != "agent")
        kill_processes(cluster, node, f"^[^ ]*python.*{pattern}")
        recovery.wait()
    assert status_of(cluster, run)["job_ids"][0] == run["job_id"] and len(status_of(cluster, run)["job_ids"]) == 2
    assert cluster.sacct(run["job_id"], "State") == ["RUNNING"], "one job, never requeued"
    recovery = Recovery(cluster, run, "supervisor killed")
    kill_processes(cluster, node, "submitit.core._submit")
    recovery.wait()
    assert numbers(cluster, run) == unharmed


@pytest.mark.slow
def test_a_driver_of_its_own(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """The loop in a CPU job, the worker in a preemptible one: preempted, the loop only waits, and is told why."""
    run = train(cluster, cluster="preemptible", driver="separate", resources={"cpus_per_node": 8})
    worker = cluster.run_folder(f"{run['run_id']}-w0")
    wait_for_steps(cluster, run, 3)
    node = cluster.act("alice", "status", worker.name)["nodes"][0]
    recovery = Recovery(cluster, {"run_id": worker.name}, "the worker of a separate driver preempted", steps_of=run)
    for each in ("node1", "node2", "node3"):  # every node, or it would only move
        if each == node or "idle" in cluster.slurm("sinfo", "-h", "-N", "-n", each, "-p", "high", "-o", "%t"):
            preempt(cluster, each)
    recovery.wait()
    assert numbers(cluster, run) == unharmed
    assert cluster.events(run["run_id"]).count("loop_started") == 1, "the loop never knew"
    nothing_left(cluster, run)
    nothing_left(cluster, {"run_id": worker.name})


@pytest.mark.slow
def test_a_session_outlives_its_workers_job(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """The loop in a notebook on the login node; an administrator ends the worker's job under it."""
    runs = cluster.home("alice") / "tinker_hpc_data" / "runs"
    before = set(runs.glob("notebook-sft-*"))
    with ThreadPoolExecutor(1) as pool:
        argv = (str(TINY_MODEL), str(STEPS), "1.0")
        notebook = pool.submit(cluster.program, "alice", "session_sft.py", *argv, timeout_s=280)
        folder = until(lambda: set(runs.glob("notebook-sft-*")) - before, timeout_s=60, what="the session").pop()
        run = {"run_id": folder.name}
        wait_for_steps(cluster, run, 3)
        recovery = Recovery(cluster, run, "a session's worker cancelled by root")
        cluster.slurm("scancel", f"--name={folder.name}", "--state=RUNNING")
        recovery.wait()
        printed = notebook.result()
    assert numbers_of(cluster, printed) == unharmed
    nothing_left(cluster, run)
