"""Every way a run can end, on a real Slurm: the future ends too, with the right reason, as sacct has it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from continued import end_of, settled
from slurm_machine import TINY_MODEL, SlurmCluster, until


def wait_running(cluster: SlurmCluster, run: dict[str, str]) -> None:
    until(lambda: "loop_started" in cluster.events(run["run_id"]), timeout_s=60, what="the loop's start")


def test_a_loop_that_raises(cluster: SlurmCluster) -> None:
    run = cluster.submit("python", "-c", "def f(x):\n    raise ValueError('no ' + x)\nf('luck')")
    result = cluster.act("alice", "result", run["run_id"])
    assert result["error"] == "LoopFailedError"
    assert result["exit_code"] == 1 and "ValueError: no luck" in result["message"]
    outcome = json.loads((cluster.run_folder(run["run_id"]) / "outcome.json").read_text())
    assert (outcome["state"], outcome["reason"], outcome["error"]) == ("failed", "loop", "ValueError: no luck")
    assert outcome["traceback"].startswith("Traceback") and "in f" in outcome["traceback"]
    assert end_of(cluster, run["job_id"]) == ["FAILED", "1:0"]
    status = settled(cluster, run["run_id"])
    assert (status["state"], status["slurm_state"], status["exit_code"]) == ("FAILED", "FAILED", 1)


def test_cancel_while_it_waits(cluster: SlurmCluster) -> None:
    run = cluster.submit("true", cluster="later")
    waiting = until(
        lambda: (s := cluster.act("alice", "status", run["run_id"]))["reason"] == "BeginTime" and s,
        timeout_s=60,
        what="the reason it waits",
    )
    assert waiting["state"] == "PENDING" and waiting["estimated_start"] is not None
    assert cluster.sacct(run["job_id"], "State") in ([], ["PENDING"])
    assert "error" not in cluster.act("alice", "cancel", run["run_id"])
    result = cluster.act("alice", "result", run["run_id"])
    assert result["error"] == "JobCancelledError" and "without ever starting" in result["message"]
    assert end_of(cluster, run["job_id"])[0] == "CANCELLED by 2001"


def test_cancel_while_it_runs(cluster: SlurmCluster) -> None:
    run = cluster.submit("sleep", "600", resources={"nodes": 2})
    wait_running(cluster, run)
    running = cluster.act("alice", "status", run["run_id"])
    assert (running["state"], running["slurm_state"], running["nodes"]) == ("RUNNING", "RUNNING", ["node1", "node2"])
    cluster.act("alice", "cancel", run["run_id"])
    result = cluster.act("alice", "result", run["run_id"])
    assert result["error"] == "JobCancelledError" and run["run_id"] in result["message"]
    assert end_of(cluster, run["job_id"])[0] == "CANCELLED by 2001"
    assert settled(cluster, run["run_id"])["slurm_state"] == "CANCELLED by 2001"
    for node in ("node1", "node2"):
        until(
            lambda node=node: run["run_id"] not in cluster.script("sh", node, "ps", "-eo", "args").stdout,
            timeout_s=60,
            what=f"no process of the run on {node}",
        )
    # A second time is no error.
    assert "error" not in cluster.act("alice", "cancel", run["run_id"])


@pytest.mark.parametrize(
    ("options", "slurm_says", "advice"),
    [
        ({"cluster": "no_such_partition"}, "invalid partition specified: gpu_huge", "`sinfo -s` lists the partitions"),
        ({"cluster": "no_such_account"}, "Invalid account", "sacctmgr show assoc"),
        ({"resources": {"memory": "9T"}}, "Memory specification can not be satisfied", "`sinfo -o '%P %m'`"),
        ({"resources": {"gpus_per_node": 64, "ranks_per_node": 1}}, "node configuration", "64 GPUs"),
    ],
)
def test_refused_at_once(cluster: SlurmCluster, options: dict[str, object], slurm_says: str, advice: str) -> None:
    before = set((cluster.home("alice") / "tinker_hpc_data" / "runs").glob("*"))
    answer = cluster.submit("true", **options)
    assert answer["error"] == "SubmissionError"
    assert slurm_says.lower() in answer["message"].lower() and advice in answer["message"]
    assert answer["took_s"] < 60, "not after retries"
    assert set((cluster.home("alice") / "tinker_hpc_data" / "runs").glob("*")) == before, "no job, so no run"


def test_out_of_memory(cluster: SlurmCluster) -> None:
    # Each step is kept: cgroups kill at the limit, without them Slurm polls and kills what grew too big.
    eat = "import time\nkept = []\nwhile True:\n    kept.append(b'x' * (50 << 20))\n    time.sleep(0.1)"
    run = cluster.submit("python", "-c", eat, resources={"memory": "900M"})
    result = cluster.act("alice", "result", run["run_id"])
    if cluster.has_cgroups():
        assert result["error"] == "JobOutOfMemoryError"
        assert "900M" in result["message"] and "`memory`" in result["message"]
    else:
        assert result["error"] in ("JobOutOfMemoryError", "JobFailedError", "LoopFailedError")
    assert end_of(cluster, run["job_id"])[0] in ("OUT_OF_MEMORY", "FAILED")


def test_a_gateway_that_dies_comes_back(cluster: SlurmCluster) -> None:
    """Same port, same key: the loop sees a pause and nothing else."""
    loop = """
import glob, json, os, signal, time, urllib.request
folder = glob.glob(os.path.expanduser("~/tinker_hpc_data/runs/phoenix*"))[-1]
def ask():
    request = urllib.request.Request(os.environ["TINKER_BASE_URL"] + "/api/v1/get_server_capabilities",
                                     headers={"X-API-Key": os.environ["TINKER_API_KEY"]})
    return urllib.request.urlopen(request, timeout=5).status
assert ask() == 200
first = json.load(open(folder + "/gateway.json"))
os.kill(first["pid"], signal.SIGKILL)
for _ in range(900):
    time.sleep(0.1)
    try:
        assert ask() == 200
        break
    except OSError:
        pass
second = json.load(open(folder + "/gateway.json"))
assert second["pid"] != first["pid"] and second["api_key"] == first["api_key"]
print("it came back")
"""
    run = cluster.submit("python", "-c", loop, name="phoenix")
    assert cluster.act("alice", "result", run["run_id"]).get("error") is None
    assert "gateway_restarted" in cluster.events(run["run_id"])


def test_a_worker_that_cannot_start_fails_the_loops_futures(cluster: SlurmCluster) -> None:
    home = cluster.home("alice")
    cluster.as_user("alice", "cp", "-r", str(TINY_MODEL), "broken")
    (home / "broken" / "model.safetensors").write_bytes(b"\0" * 100)
    program = (
        "import tinker\n"
        f"model = {str(home / 'broken')!r}\n"
        "tinker.ServiceClient().create_lora_training_client(base_model=model, rank=4).result()\n"
    )
    run = cluster.submit("python", "-c", program, base_model=str(home / "broken"))
    result = cluster.act("alice", "result", run["run_id"])
    assert result["error"] == "LoopFailedError"
    assert "model.safetensors" in result["message"], result["message"]
    assert "worker_ended" in cluster.events(run["run_id"])
    status = json.loads((cluster.run_folder(run["run_id"]) / "workers" / "0" / "status.json").read_text())
    assert status["phase"] == "ended" and "safetensors" in status["error"]


def test_slurm_down(cluster: SlurmCluster) -> None:
    runs = cluster.home("alice") / "tinker_hpc_data" / "runs"
    before = set(runs.glob("*"))
    cluster.script("daemon", "stop", "slurmctld")
    answer = cluster.submit("true")
    cluster.script("daemon", "start", "slurmctld")
    assert answer["error"] == "SlurmUnavailableError"
    assert "Unable to contact slurm controller" in answer["message"] and "scontrol ping" in answer["message"]
    assert set(runs.glob("*")) == before, "surely no job, so no run"


def test_a_lost_answer_makes_one_job(cluster: SlurmCluster) -> None:
    """A hung controller takes the job and answers too late: sbatch gives up, the job exists."""
    asks = lambda: cluster.script("sh", "login", "pgrep", "-x", "sbatch", check=False).returncode == 0  # noqa: E731
    cluster.script("daemon", "pause", "slurmctld")
    try:
        with ThreadPoolExecutor(1) as pool:
            submitted = pool.submit(cluster.submit, "true", cluster="later", name="hung")
            until(asks, timeout_s=60, what="sbatch")
            until(lambda: not asks(), timeout_s=60, what="sbatch's patience to end")
            cluster.script("daemon", "cont", "slurmctld")
            answer = submitted.result()
    finally:
        cluster.script("daemon", "cont", "slurmctld")
    assert "error" not in answer, answer
    assert answer["took_s"] > 10, "the controller was not hung after all"
    queue = cluster.slurm("squeue", "-h", "-o", "%A %j").split("\n")
    assert [row for row in queue if "hung" in row] == [f"{answer['job_id']} {answer['run_id']}"]
