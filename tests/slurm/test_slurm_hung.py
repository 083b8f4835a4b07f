"""Ranks that stand still instead of dying, on a real Slurm: replaced in place, equal to the bit, nobody asked.

In the slow form of the tier (`make slurm-long`): a stopped process is given 20 seconds before it is killed.
"""

from __future__ import annotations

from typing import Any

import pytest
from slurm_machine import SlurmCluster, until
from test_slurm_continues import Recovery, numbers, status_of, steps, train, wait_for_steps

RANK, AGENT = "-m tinker_hpc.worker --worker-dir {folder}", "torch.distributed.run.*{folder}"


def find(cluster: SlurmCluster, run: dict[str, Any], pattern: str, *, rank: int | None = None) -> tuple[str, str]:
    """Node, and id there, of the run's process of that kind."""
    folder = cluster.run_folder(run["run_id"]) / "workers"
    node = status_of(cluster, run)["nodes"][0]
    found = cluster.script("sh", node, "pgrep", "-f", f"^[^ ]*python.*{pattern.format(folder=folder)}").stdout.split()
    for pid in found:
        environment = cluster.script("sh", node, "cat", f"/proc/{pid}/environ").stdout.split("\0")
        if rank is None or f"RANK={rank}" in environment:
            return node, pid
    raise AssertionError(f"no process like {pattern} on {node}: {found}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_rank_or_its_agent_stands_still(cluster: SlurmCluster) -> None:
    expected = numbers(cluster, train(cluster))
    run = train(cluster, pause_s=3.0)  # without their agent the ranks work on: they must not come to the end
    for what, pattern in (("the only rank", RANK), ("the agent", AGENT)):
        wait_for_steps(cluster, run, steps(cluster, run) + 2, timeout_s=300)
        node, pid = find(cluster, run, pattern)
        recovery = Recovery(cluster, run, f"{what} stopped (SIGSTOP) and left so", in_place=pattern == RANK)
        cluster.script("sh", node, "kill", "-STOP", pid)
        if pattern == AGENT:  # its ranks work on without it; it is replaced all the same
            until(lambda: cluster.events(run["run_id"]).count("ranks_hung") == 2, timeout_s=120, what="the agent's end")
        recovery.wait(timeout_s=300)
    assert numbers(cluster, run) == expected
    assert status_of(cluster, run)["job_ids"][0] == run["job_id"] and len(status_of(cluster, run)["job_ids"]) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_either_of_two_ranks_stands_still(cluster: SlurmCluster) -> None:
    two = {"resources": {"tp_size": 2, "ranks_per_node": 2, "memory": "3G"}}
    expected = numbers(cluster, train(cluster, **two))
    run = train(cluster, pause_s=1.0, **two)
    for rank in (1, 0):
        wait_for_steps(cluster, run, steps(cluster, run) + 2, timeout_s=300)
        node, pid = find(cluster, run, RANK, rank=rank)
        recovery = Recovery(cluster, run, f"rank {rank} of two stopped (SIGSTOP) and left so", in_place=True)
        cluster.script("sh", node, "kill", "-STOP", pid)
        recovery.wait(timeout_s=300)
    assert numbers(cluster, run) == expected
    assert cluster.events(run["run_id"]).count("ranks_hung") == 2
