"""What the tests of continued runs share: one loop, what it returns and saves, and the time until it goes on.

The same loop is run once without any harm (`unharmed`, conftest.py); whatever is done to the others, they must end with
the same losses and the same adapter, bit for bit. `Recovery` takes the seconds from the blow to the next new optimizer
step; pytest says them at its end (conftest.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import safe_open
from slurm_machine import PROGRAMS, TINY_MODEL, SlurmCluster, until

from tinker_hpc.log import ResultReader
from tinker_hpc.run_folder import checkpoint_folder

STEPS = 24
TIMES: list[str] = []
"""What recovered how fast, in the order of the tests."""
PAUSE_S = 0.4
"""After each step: long enough to strike in between."""


@dataclass(frozen=True)
class Numbers:
    """What a run returned, and a hash of the adapter and optimizer it saved."""

    losses: tuple[float, ...]
    state: str
    tensors: dict[str, np.ndarray] = field(compare=False)
    """What the hash is of, for where only nearly equal is promised."""


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
    digest, tensors = hashlib.sha256(), {}
    for path in sorted(folder.glob("*.safetensors")):  # adapter and optimizer; the order of metadata in them varies
        with safe_open(path, "numpy") as file:
            digest.update(f"{path.name} {sorted(file.metadata().items())}".encode())
            for key in sorted(file.keys()):
                tensors[f"{path.name} {key}"] = file.get_tensor(key)
                digest.update(key.encode() + file.get_tensor(key).tobytes())
    return Numbers(tuple(printed["losses"]), digest.hexdigest(), tensors)


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
        outcome = cluster.run_folder(run["run_id"]) / "outcome.json"  # a run that is over has recovered, too
        before = self._before + 1  # one may have been on its way
        if not self._in_place:
            until(
                lambda: cluster.events(run["run_id"]).count("worker_ready") > self._starts or outcome.exists(),
                timeout_s=timeout_s,
                what=f"a worker after: {self._what}",
            )
            before = steps(cluster, self._steps_of)
        until(
            lambda: steps(cluster, self._steps_of) > before or outcome.exists(),
            timeout_s=timeout_s,
            what=f"a step after: {self._what}",
        )
        seconds = time.monotonic() - self._struck_at
        TIMES.append(f"{seconds:6.1f} s  {self._what}")
        return seconds


def status_of(cluster: SlurmCluster, run: dict[str, Any]) -> dict[str, Any]:
    return cluster.act("alice", "status", run["run_id"])


def queue(cluster: SlurmCluster) -> list[str]:
    """Names of all live jobs."""
    return cluster.slurm("squeue", "-h", "-t", "PD,R,S,CF,CG", "-o", "%j").split()


def nothing_left(cluster: SlurmCluster, run: dict[str, Any]) -> None:
    """The last successor was taken back, and no job of the run is in the queue."""
    until(lambda: run["run_id"] not in queue(cluster), timeout_s=60, what="the end of all jobs of the run")


def preempt(cluster: SlurmCluster, node: str = "node1") -> None:
    """Another user's job of a higher partition takes a whole node for three seconds."""
    argv = ["sbatch", "-p", "high", "-w", node, "-c", "8", "-o", "/dev/null", "--wrap", "sleep 3"]
    assert cluster.as_user("bob", *argv).returncode == 0


def kill_processes(cluster: SlurmCluster, node: str, pattern: str, signal: str = "KILL") -> None:
    """Signal every process on a node whose command line matches; at least one must."""
    done = cluster.script("sh", node, "pkill", f"-{signal}", "-f", pattern, check=False)
    assert done.returncode == 0, f"nothing on {node} matches {pattern}: {done.stderr}"


def redone(cluster: SlurmCluster, run: dict[str, Any]) -> list[int]:
    """How many answered requests each worker after the first computed again."""
    reader, found = ResultReader(cluster.run_folder(run["run_id"]) / "workers" / "0"), []
    while records := reader.poll():
        found += [record.header["num_requests"] for record in records if record.header["op"] == "redone"]
    return found


def end_of(cluster: SlurmCluster, job_id: str) -> list[str]:
    """State and exit code of a job in accounting, once it has ended (accounting follows after seconds)."""

    def ended() -> list[str]:
        row = cluster.sacct(job_id, "State", "ExitCode")
        return row if row and row[0] not in ("PENDING", "RUNNING", "COMPLETING") else []

    return until(ended, timeout_s=60, what=f"the end of job {job_id} in accounting")


def settled(cluster: SlurmCluster, run_id: str) -> dict[str, Any]:
    """The run's status once its job's processes have ended too."""
    ending = ("RUNNING", "COMPLETING")
    return until(
        lambda: (s := cluster.act("alice", "status", run_id))["slurm_state"] not in ending and s,
        timeout_s=60,
        what=f"the end of run {run_id} in `status`",
    )
