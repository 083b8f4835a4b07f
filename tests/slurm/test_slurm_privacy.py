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
            urllib.request.urlopen(request, timeout=5)
        assert refused.value.code == 401
        refused.value.close()
    close = urllib.request.Request(f"{address['base_url']}/internal/close", method="POST", data=b"")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(close, timeout=5)
    assert refused.value.code == 401
    refused.value.close()

    # The key is in no command line, where every user of a node could read it.
    for node in ("node1", "login"):
        assert address["api_key"] not in cluster.script("sh", node, "ps", "-eo", "args").stdout

    # Slurm guards the job itself.
    assert cluster.as_user("bob", "scancel", run["job_id"]).returncode != 0
    assert cluster.act("alice", "status", run["run_id"])["state"] == "RUNNING"
    assert cluster.act("bob", "status", run["run_id"])["error"] == "UnknownRunError"
