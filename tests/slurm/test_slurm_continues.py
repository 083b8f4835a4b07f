"""Jobs die, the run lives: every way a job is ended from outside, on a real Slurm, with the time to recover.

The same loop is run once without any harm; whatever is done to the others, they must end with the same losses and the
same adapter, bit for bit. Each test prints the seconds from the blow to the next new optimizer step.
"""

from __future__ import annotations

import hashlib
import json
import time
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
    return slurm.submit(
        "python",
        str(PROGRAMS / "sft_loop.py"),
        str(TINY_MODEL),
        str(STEPS),
        str(PAUSE_S),
        resources=resources,
        **options,
    )


def numbers(cluster: SlurmCluster, run: dict[str, Any]) -> Numbers:
    """Wait for a run's end; what its loop printed last, and what it saved."""
    result = cluster.act("alice", "result", run["run_id"], timeout_s=280)
    assert result.get("error") is None, result.get("message")
    printed = json.loads((cluster.run_folder(run["run_id"]) / "logs" / "loop.log").read_text().splitlines()[-1])
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
    """Times from a blow to the first optimizer step after it."""

    def __init__(self, cluster: SlurmCluster, run: dict[str, Any], what: str) -> None:
        self._cluster, self._run, self._what = cluster, run, what
        self._struck_at = time.monotonic()
        self._starts = cluster.events(run["run_id"]).count("worker_ready")

    def wait(self, *, timeout_s: float = 150) -> float:
        cluster, run = self._cluster, self._run
        until(
            lambda: cluster.events(run["run_id"]).count("worker_ready") > self._starts,
            timeout_s=timeout_s,
            what=f"a worker after: {self._what}",
        )
        before = steps(cluster, run)
        until(lambda: steps(cluster, run) > before, timeout_s=60, what=f"a step after: {self._what}")
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


def test_preempted_with_grace(cluster: SlurmCluster, unharmed: Numbers) -> None:
    """A job of a higher partition takes the node; ours ends within its grace, its successor waits and goes on."""
    run = train(cluster, cluster="low", resources={"cpus_per_node": 8})
    wait_for_steps(cluster, run, 3)
    waiting = cluster.slurm("squeue", "-h", "-n", run["run_id"], "-t", "PD", "-o", "%A %r %E")
    assert "Dependency" in waiting and f"afternotok:{run['job_id']}" in waiting, "the successor was there before"
    recovery = Recovery(cluster, run, "preempted, requeue mode, grace 5 s")
    cluster.as_user("bob", *["sbatch", "-p", "high", "-w", "node1", "-c", "8", "-o", "/dev/null", "--wrap"], "sleep 3")
    recovery.wait()
    assert numbers(cluster, run) == unharmed
    status = status_of(cluster, run)
    assert status["state"] == "COMPLETED" and len(status["job_ids"]) >= 2
    nothing_left(cluster, run)
