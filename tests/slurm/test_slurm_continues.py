"""Jobs die, the run lives: every way a job is ended from outside, on a real Slurm, with the time to recover.

The same loop is run once without any harm; whatever is done to the others, they must end with the same losses and the
same adapter, bit for bit. Each test prints the seconds from the blow to the next new optimizer step.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from safetensors import safe_open
from slurm_machine import PROGRAMS, TINY_MODEL, SlurmCluster, until

from tinker_hpc.run_folder import checkpoint_folder

STEPS = 24
PAUSE_S = 0.4
"""After each step: long enough to strike in between."""


@dataclass(frozen=True)
class Numbers:
    """What a run returned, and a hash of the adapter and optimizer it saved."""

    losses: tuple[float, ...]
    state: str


def train(slurm: SlurmCluster, **options: Any) -> dict[str, Any]:
    """Submit the loop of this module."""
    resources = {"memory": "2G", **options.pop("resources", {})}
    pause_s, program = options.pop("pause_s", PAUSE_S), options.pop("program", "sft_loop.py")
    loop = [str(PROGRAMS / program), str(TINY_MODEL), str(STEPS), str(pause_s)]
    return slurm.submit("python", *loop, resources=resources, **options)


def numbers(cluster: SlurmCluster, run: dict[str, Any]) -> Numbers:
    """Wait for a run's end; what its loop printed last, and what it saved."""
    result = cluster.act("alice", "result", run["run_id"], timeout_s=280)
    assert result.get("error") is None, result.get("message")
    return numbers_of(
        cluster, json.loads((cluster.run_folder(run["run_id"]) / "logs" / "loop.log").read_text().splitlines()[-1])
    )


def numbers_of(cluster: SlurmCluster, printed: dict[str, Any]) -> Numbers:
    """The same from what the loop printed."""
    model_id, _, name = printed["checkpoint"].removeprefix("tinker://").split("/")
    folder = checkpoint_folder(cluster.home("alice") / "tinker_hpc_data", model_id, "weights", name)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):  # adapter and optimizer; the order of metadata in them varies
        with safe_open(path, "numpy") as file:
            digest.update(f"{path.name} {sorted(file.metadata().items())}".encode())
            for key in sorted(file.keys()):
                digest.update(key.encode() + file.get_tensor(key).tobytes())
    return Numbers(tuple(printed["losses"]), digest.hexdigest())


def steps(cluster: SlurmCluster, run: dict[str, Any]) -> int:
    """Optimizer steps so far."""
    path = cluster.run_folder(run["run_id"]) / "workers" / "0" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_steps(cluster: SlurmCluster, run: dict[str, Any], count: int, *, timeout_s: float = 90) -> None:
    until(lambda: steps(cluster, run) >= count, timeout_s=timeout_s, what=f"{count} optimizer steps")


class Recovery:
    """Times from a blow to the first optimizer step after it.

    Args:
        in_place: the worker's agent lives on; else a new one must get ready first.
        steps_of: the run whose steps count, where the worker has a run folder of its own.
    """

    def __init__(
        self,
        cluster: SlurmCluster,
        run: dict[str, Any],
        what: str,
        *,
        in_place: bool = False,
        steps_of: dict[str, Any] | None = None,
    ) -> None:
        self._cluster, self._run, self._what = cluster, run, what
        self._steps_of = steps_of or run
        self._in_place = in_place
        self._before = steps(cluster, self._steps_of)
        self._starts = cluster.events(run["run_id"]).count("worker_ready")
        self._struck_at = time.monotonic()

    def wait(self, *, timeout_s: float = 150) -> float:
        cluster, run = self._cluster, self._run
        before = self._before + 1  # one may have been on its way
        if not self._in_place:
            until(
                lambda: cluster.events(run["run_id"]).count("worker_ready") > self._starts,
                timeout_s=timeout_s,
                what=f"a worker after: {self._what}",
            )
            before = steps(cluster, self._steps_of)
        until(lambda: steps(cluster, self._steps_of) > before, timeout_s=timeout_s, what=f"a step after: {self._what}")
        seconds = time.monotonic() - self._struck_at
        print(f"\ntime to recover: {self._what}: {seconds:.1f} s")
        return seconds


@pytest.fixture(scope="module")
def unharmed(cluster_session: SlurmCluster) -> Numbers:
    """The same loop without interruption."""
    cluster_session.script("reset")
    return numbers(cluster_session, train(cluster_session))


def status_of(cluster: SlurmCluster, run: dict[str, Any]) -> dict[str, Any]:
    return cluster.act("alice", "status", run["run_id"])


def queue(cluster: SlurmCluster) -> list[str]:
    """Names of all live jobs."""
    return cluster.slurm("squeue", "-h", "-t", "PD,R,S,CF,CG", "-o", "%j").split()


def nothing_left(cluster: SlurmCluster, run: dict[str, Any]) -> None:
    """The last successor was taken back, and no job of the run is in the queue."""
    until(lambda: run["run_id"] not in queue(cluster), timeout_s=20, what="the end of all jobs of the run")


def preempt(cluster: SlurmCluster, node: str = "node1") -> None:
    """Another user's job of a higher partition takes a whole node for three seconds."""
    argv = ["sbatch", "-p", "high", "-w", node, "-c", "8", "-o", "/dev/null", "--wrap", "sleep 3"]
    assert cluster.as_user("bob", *argv).returncode == 0


def kill_processes(cluster: SlurmCluster, node: str, pattern: str, signal: str = "KILL") -> None:
    """Signal every process on a node whose command line matches; at least one must."""
    done = cluster.script("sh", node, "pkill", f"-{signal}", "-f", pattern, check=False)
    assert done.returncode == 0, f"nothing on {node} matches {pattern}: {done.stderr}"


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


@pytest.mark.slow
def test_a_site_that_forbids_sbatch_on_its_nodes(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """The job finds out by being refused, has itself requeued instead, and writes down what it learned."""
    sites = cluster.home("alice") / "tinker_hpc_data" / "sites"
    refusal = cluster.base / "refuse-sbatch"  # what TACC's compute nodes have in its place
    refusal.write_text(
        "#!/bin/sh\necho 'Error: sbatch not available on compute nodes. Use a login node.' >&2\nexit 1\n"
    )
    refusal.chmod(0o755)
    cluster.script("sh", "node1", "mount", "--bind", str(refusal), "/usr/bin/sbatch")
    try:
        run = train(cluster, cluster="low", resources={"cpus_per_node": 8})
        wait_for_steps(cluster, run, 3)
        assert json.loads((sites / "low.json").read_text())["continuation"] == "requeue"
        recovery = Recovery(cluster, run, "preempted where a job may only requeue itself")
        preempt(cluster)
        recovery.wait()
        assert numbers(cluster, run) == unharmed
        assert status_of(cluster, run)["job_ids"] == [run["job_id"]], "the same job, started twice"
    finally:
        cluster.script("sh", "node1", "umount", "/usr/bin/sbatch")
        (sites / "low.json").unlink(missing_ok=True)


def test_time_limit(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Work stops before the limit, and the next job goes on. Slurm's finest limit is a minute."""
    run = train(cluster, resources={"time": 1}, program="paced_loop.py", pause_s=2.2)
    until(
        lambda: "handed_over" in cluster.events(run["run_id"]), timeout_s=90, what="the handover before the time limit"
    )
    recovery = Recovery(cluster, run, "handed over before the time limit")
    assert cluster.sacct(run["job_id"], "State") != ["TIMEOUT"]
    recovery.wait()
    assert numbers(cluster, run) == unharmed


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
    run = train(cluster)
    worker = str(cluster.run_folder(run["run_id"]) / "workers")
    victims = {
        "rank": f"-m tinker_hpc.worker --worker-dir {worker}",
        "agent": f"torch.distributed.run.*{worker}",
        "gateway": f"tinker_hpc.gateway.*{run['run_id']}",
        "loop": "sft_loop.py",
    }
    for who, pattern in victims.items():
        wait_for_steps(cluster, run, steps(cluster, run) + 2)
        node = status_of(cluster, run)["nodes"][0]
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
def test_slurm_itself_is_away(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Controller and accounting down while the run trains, and a job lost while accounting is away."""
    away(cluster, unharmed, seconds=12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurmctld_down_for_two_minutes(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """The long form: pytest tests/slurm -m slow."""
    away(cluster, unharmed, seconds=120)


def away(cluster: SlurmCluster, unharmed: Numbers, *, seconds: float) -> None:
    run = train(cluster, pause_s=max(1.0, seconds / 12))
    wait_for_steps(cluster, run, 2)
    cluster.script("daemon", "stop", "slurmctld")
    before = steps(cluster, run)
    time.sleep(seconds)
    during = steps(cluster, run) - before
    cluster.script("daemon", "start", "slurmctld")
    print(f"\nslurmctld down for {seconds:.0f} s: {during} steps were made meanwhile")
    assert during >= 3, "the run does not need the controller"
    cluster.script("daemon", "stop", "slurmdbd")
    try:
        answers = lambda: "UP" in cluster.script("exec", "scontrol", "ping", check=False).stdout  # noqa: E731
        until(answers, timeout_s=30, what="slurmctld")
        recovery = Recovery(cluster, run, "job cancelled by root while slurmdbd is down")
        until(
            lambda: cluster.script("exec", "scancel", run["job_id"], check=False).returncode == 0,
            timeout_s=30,
            what="scancel",
        )
        recovery.wait(timeout_s=150 + 2 * seconds)  # a loop that rests does so again while it replays
    finally:
        cluster.script("daemon", "start", "slurmdbd")
    assert numbers(cluster, run) == unharmed


def test_held_and_released_and_cancelled(cluster: SlurmCluster) -> None:
    """A successor that is held says so; a user's cancel ends the job and all that would follow it."""
    run = train(cluster, pause_s=5.0)
    wait_for_steps(cluster, run, 1)
    until(lambda: len(status_of(cluster, run)["job_ids"]) == 2, timeout_s=20, what="the successor")
    successor = status_of(cluster, run)["job_ids"][1]
    cluster.slurm("scontrol", "hold", successor)
    recovery = Recovery(cluster, run, "cancelled by root, the successor held for some seconds")
    cluster.slurm("scancel", run["job_id"])
    waiting = until(
        lambda: (s := status_of(cluster, run))["state"] == "PENDING" and "JobHeld" in s["reason"] and s,
        timeout_s=40,
        what="the reason the run waits",
    )
    assert waiting["job_id"] == successor
    cluster.slurm("scontrol", "release", successor)
    recovery.wait()
    cluster.act("alice", "cancel", run["run_id"])
    result = cluster.act("alice", "result", run["run_id"])
    assert result["error"] == "JobCancelledError"
    nothing_left(cluster, run)
    num_jobs = len(status_of(cluster, run)["job_ids"])
    time.sleep(5.0)
    assert run["run_id"] not in queue(cluster) and len(status_of(cluster, run)["job_ids"]) == num_jobs


def test_the_owners_scancel_ends_the_run(cluster: SlurmCluster) -> None:
    """Slurm knows whose scancel it was: the next job finds the owner's, says so, and ends."""
    run = train(cluster, pause_s=5.0)
    wait_for_steps(cluster, run, 1)
    assert cluster.as_user("alice", "scancel", run["job_id"]).returncode == 0
    result = cluster.act("alice", "result", run["run_id"])
    assert result["error"] == "JobCancelledError" and "scancel" in result["message"]
    nothing_left(cluster, run)


@pytest.mark.slow
def test_resumed_after_a_cancel(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """Cancelled, then resumed with another number of ranks: the run goes on where the layout allows only 1e-5."""
    run = train(cluster, pause_s=1.5)
    wait_for_steps(cluster, run, 3)
    refused = cluster.act("alice", "resume", run["run_id"])
    assert refused["error"] == "ConfigError" and "not over" in refused["message"]
    cluster.act("alice", "cancel", run["run_id"])
    assert cluster.act("alice", "result", run["run_id"])["error"] == "JobCancelledError"
    nothing_left(cluster, run)
    recovery = Recovery(cluster, run, "cancelled, then resumed on two ranks")
    sizes = {"resources": {"ranks_per_node": 2, "tp_size": 2, "memory": "3G"}}
    assert "error" not in cluster.act("alice", "resume", run["run_id"], json.dumps(sizes))
    recovery.wait()
    resumed = numbers(cluster, run)
    assert resumed.losses == pytest.approx(unharmed.losses, rel=1e-5)


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
