"""Two users on one machine: what is alice's stays hers."""

from __future__ import annotations

import json
import stat
import urllib.error
import urllib.request

import pytest
from slurm_machine import SlurmCluster, until


def test_files_and_gateway_are_private(cluster: SlurmCluster) -> None:
    run = cluster.submit("sleep", "600")
    folder = cluster.run_folder(run["run_id"])
    until(lambda: "loop_started" in cluster.events(run["run_id"]), timeout_s=60, what="the loop's start")

    # Files: nothing under the data root can be entered or read by others.
    data_root = folder.parent.parent
    open_to_others = [
        f"{stat.S_IMODE(path.lstat().st_mode):04o} {path}"
        for path in [data_root, *data_root.rglob("*")]
        if path.is_dir() and stat.S_IMODE(path.lstat().st_mode) & 0o077
    ]
    assert open_to_others == []
    assert stat.S_IMODE((folder / "gateway.json").stat().st_mode) == 0o600
    # Through the homes' own closed doors bob cannot even look; open alice's for the moment and he still cannot.
    cluster.home("alice").chmod(0o755)
    try:
        for target in ("gateway.json", "run.json", "logs/gateway.log", ""):
            tried = cluster.as_user("bob", "cat" if target else "ls", str(folder / target))
            assert tried.returncode != 0 and "Permission denied" in tried.stderr
    finally:
        cluster.home("alice").chmod(0o700)

    # The gateway: every node shares this machine's loopback, so bob reaches the port, and is turned away.
    address = json.loads((folder / "gateway.json").read_text())
    assert address["base_url"].startswith("http://127.0.0.1:")
    for headers in ({}, {"X-API-Key": "tml-guess"}, {"Authorization": "Bearer tml-guess"}):
        request = urllib.request.Request(f"{address['base_url']}/api/v1/get_server_capabilities", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 401
        refused.value.close()
    close = urllib.request.Request(f"{address['base_url']}/internal/close", method="POST", data=b"")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(close, timeout=60)
    assert refused.value.code == 401
    refused.value.close()

    # The key is in no command line, where every user of a node could read it.
    for node in ("node1", "login"):
        assert address["api_key"] not in cluster.script("sh", node, "ps", "-eo", "args").stdout

    # Slurm guards the job itself.
    assert cluster.as_user("bob", "scancel", run["job_id"]).returncode != 0
    assert cluster.act("alice", "status", run["run_id"])["state"] == "RUNNING"
    assert cluster.act("bob", "status", run["run_id"])["error"] == "UnknownRunError"


def test_another_user_of_the_node_learns_no_key_and_forges_nothing(cluster: SlurmCluster) -> None:
    """What Slurm and the kernel show everybody: the job, its script, its processes. None of it holds the key."""
    run = cluster.submit("sleep", "600", resources={"nodes": 2})
    folder = cluster.run_folder(run["run_id"])
    until(lambda: "loop_started" in cluster.events(run["run_id"]), timeout_s=60, what="the loop's start")
    key = json.loads((folder / "gateway.json").read_text())["api_key"]

    # Slurm: what bob can ask, and even what only alice can.
    shown = cluster.as_user("bob", "scontrol", "show", "job", "-dd", run["job_id"])
    assert run["job_id"] in shown.stdout and key not in shown.stdout
    stolen = cluster.as_user("bob", "scontrol", "write", "batch_script", run["job_id"], "-")
    assert "Invalid user id" in stolen.stderr and stolen.stdout == ""  # Slurm 22.05 says so with exit code 0
    script = cluster.as_user("alice", "scontrol", "write", "batch_script", run["job_id"], "-")
    assert "#SBATCH" in script.stdout and key not in script.stdout
    assert cluster.as_user("bob", "scontrol", "update", f"JobId={run['job_id']}", "Requeue=1").returncode != 0

    # The kernel: the environments of the run's processes are for their owner's eyes only. The loop's does hold the key.
    holders = 0
    for pid in cluster.script("sh", "node1", "pgrep", "-u", "2001").stdout.split():
        environ = f"/proc/{pid}/environ"
        denied = cluster.script("sh", "node1", "setpriv", "--reuid=2002", "--clear-groups", "cat", environ, check=False)
        assert denied.returncode != 0 and key not in denied.stdout
        holders += key in cluster.script("sh", "node1", "cat", environ, check=False).stdout
        assert key not in cluster.script("sh", "node1", "cat", f"/proc/{pid}/cmdline", check=False).stdout
    assert holders == 1, "the loop, and nobody else: not the supervisor, whose environment the next job inherits"

    # Files: nothing of the run is open to others, logs and Slurm's own output included.
    closed = [path for path in folder.rglob("*") if path.lstat().st_mode & 0o077 and not path.is_symlink()]
    assert [str(path.relative_to(folder)) for path in closed if path.parent != folder / "slurm"] == []

    # And the key is nowhere in them but where the loop's supervisor looks for it: in no log, no event, no job's script.
    holding = [path for path in folder.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert holding == [folder / "gateway.json"]

    # A job of bob's that carries the run's name is not taken for one of the run.
    cluster.as_user("bob", "sbatch", "-J", run["run_id"], "-o", "/dev/null", "--wrap", "sleep 60")
    assert cluster.act("alice", "status", run["run_id"])["job_id"] == run["job_id"]
    cluster.act("alice", "cancel", run["run_id"])
    assert run["run_id"] in cluster.slurm("squeue", "-h", "-u", "bob", "-o", "%j"), "nor ended with it"


def test_a_folder_that_others_can_read_is_refused(cluster: SlurmCluster) -> None:
    """The job looks before it works: a data root that was opened since, or a gateway.json that is not its owner's."""
    run = cluster.submit("true", cluster="later")
    folder = cluster.run_folder(run["run_id"])
    folder.chmod(0o755)
    cluster.slurm("scontrol", "update", f"JobId={run['job_id']}", "StartTime=now")
    log = folder / "slurm" / f"{run['job_id']}_0_log.out"
    until(lambda: log.exists() and "chmod go=" in log.read_text(), timeout_s=60, what="the refusal in the job's log")
    assert not (folder / "attempts").exists(), "nothing was begun"
