"""A cluster that keeps no accounting: sacct has nothing to say, everything still ends with its reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import give_configuration, make_cluster, why_not
from slurm_machine import SlurmCluster, until


@pytest.fixture(scope="module")
def bare_cluster() -> Iterator[SlurmCluster]:
    """One node, no slurmdbd; up in half a second, beside the other cluster."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    cluster = make_cluster("bare")
    cluster.script("down", "--purge")
    cluster.script("up", "--no-dbd", "--no-cgroup", "--nodes", "1", "--gpus", "0")
    give_configuration(cluster, "alice")
    yield cluster
    cluster.script("down", "--purge")
    cluster.base.parent.rmdir()


def test_ends_are_known_without_accounting(bare_cluster: SlurmCluster) -> None:
    said = bare_cluster.script("exec", "-u", "alice", "sacct", check=False)
    assert said.returncode == 1 and "accounting storage is disabled" in said.stderr

    good = bare_cluster.submit("true")
    bad = bare_cluster.submit("bash", "-c", "exit 3")
    assert bare_cluster.act("alice", "result", good["run_id"]).get("error") is None
    assert bare_cluster.act("alice", "result", bad["run_id"])["exit_code"] == 3
    ended = until(
        lambda: (s := bare_cluster.act("alice", "status", bad["run_id"]))["slurm_state"] == "FAILED" and s,
        timeout_s=60,
        what="the end of the failing job",
    )
    assert ended["elapsed_s"] is not None and ended["nodes"] == ["node1"]

    sleeper = bare_cluster.submit("sleep", "600")
    until(lambda: "loop_started" in bare_cluster.events(sleeper["run_id"]), timeout_s=60, what="the loop's start")
    # Ended behind our back: without accounting nobody knows by whom, so the run goes on until its owner says otherwise.
    bare_cluster.slurm("scancel", sleeper["job_id"])
    until(lambda: bare_cluster.events(sleeper["run_id"]).count("loop_started") == 2, timeout_s=60, what="its next job")
    bare_cluster.act("alice", "cancel", sleeper["run_id"])
    assert bare_cluster.act("alice", "result", sleeper["run_id"])["error"] == "JobCancelledError"
