"""The story of a request on a real Slurm: a function submitted over two nodes trains, and its value comes back."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

from slurm_machine import TINY_MODEL, SlurmCluster, until

from tinker_hpc.run_folder import checkpoint_folder


def test_gpus_are_asked_for_and_shared_out(cluster: SlurmCluster) -> None:
    """Of two GPUs one rank gets the first, the loop the other; accounting counts both. They are made up, so the worker
    is refused once torch looks for its own: the loop is over before.
    """
    run = cluster.submit(
        "bash", "-c", "echo GPU $CUDA_VISIBLE_DEVICES", resources={"gpus_per_node": 2, "ranks_per_node": 1}
    )
    assert cluster.act("alice", "result", run["run_id"]).get("error") is None
    log = (cluster.run_folder(run["run_id"]) / "logs" / "loop.log").read_text()
    assert log == "GPU 1\n"
    status = until(
        lambda: (s := cluster.act("alice", "status", run["run_id"]))["gpu_hours"] and s,
        timeout_s=60,
        what="GPU-hours in accounting",
    )
    assert status["gpu_hours"] >= 2 * 1 / 3600


TEACHER_AND_STUDENT = """
import sys, tinker
service = tinker.ServiceClient()
student = service.create_lora_training_client(base_model=sys.argv[1], rank=4).result()
teacher = service.create_sampling_client(base_model=sys.argv[2]).result()
tokens = student.get_tokenizer().encode("What is 27 + 46? It is 73.")
assert len(teacher.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()) == len(tokens)
print("both answered")
"""


def test_two_base_models_are_two_jobs_that_end_together(cluster: SlurmCluster) -> None:
    """Loop and gateway are on one node, the second model's worker on another; nothing but files goes between."""
    teacher = cluster.home("alice") / "teacher"
    shutil.copytree(TINY_MODEL, teacher, dirs_exist_ok=True, copy_function=shutil.copyfile)
    run = cluster.submit(
        "python", "-c", TEACHER_AND_STUDENT, str(TINY_MODEL), str(teacher), further_base_models=[str(teacher)],
        resources={"memory": "5G"},
    )  # fmt: skip
    result = cluster.act("alice", "result", run["run_id"])
    assert result.get("error") is None, result["message"]
    assert "both answered" in (cluster.run_folder(run["run_id"]) / "logs" / "loop.log").read_text()
    further = f"{run['run_id']}-w1"
    status = until(
        lambda: (s := cluster.act("alice", "status", further))["slurm_state"] == "COMPLETED" and s,
        timeout_s=60,
        what="the end of the second worker's job",
    )
    first = cluster.act("alice", "status", run["run_id"])
    assert status["job_id"] != first["job_id"] and status["nodes"] != first["nodes"]
    events = (cluster.run_folder(further) / "events.jsonl").read_text()
    assert "closed" in events, "by the run's close request, not by scancel"


def test_a_run_cancelled_in_the_queue_takes_its_further_workers_along(cluster: SlurmCluster) -> None:
    teacher = cluster.home("alice") / "teacher"
    shutil.copytree(TINY_MODEL, teacher, dirs_exist_ok=True, copy_function=shutil.copyfile)
    run = cluster.submit("true", cluster="later", further_base_models=[str(teacher)])
    assert len(cluster.slurm("squeue", "-h", "-o", "%j").split()) == 2
    cluster.act("alice", "cancel", run["run_id"])
    until(lambda: not cluster.slurm("squeue", "-h", "-o", "%j").split(), timeout_s=60, what="an empty queue")


def test_fine_tuning_over_two_nodes(cluster: SlurmCluster) -> None:
    """TP 2 x DP 2 over gloo: 2 nodes, 2 ranks each. One rank of the second node is killed between two steps: the job
    stays, and the loop sees nothing but a pause."""
    runs = cluster.home("alice") / "tinker_hpc_data" / "runs"
    with ThreadPoolExecutor(1) as pool:
        submitted = pool.submit(cluster.program, "alice", "submit_sft.py", str(TINY_MODEL), "30", timeout_s=280)

        def steps() -> int:
            return sum(len(path.read_text().splitlines()) for path in runs.glob("sft-*/workers/0/metrics.jsonl"))

        until(lambda: steps() >= 3 or submitted.done(), timeout_s=200, what="3 steps")
        ranks = cluster.script("sh", "node2", "pgrep", "-f", "tinker_hpc.worker --worker-dir").stdout.split()
        cluster.script("sh", "node2", "kill", "-9", ranks[-1])
        answer = submitted.result()
    losses = answer["value"]["losses"]
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0], f"the loss did not fall: {losses}"
    lease = cluster.run_folder(answer["run_id"]) / "workers" / "0" / "lease"
    assert len(list(lease.glob("fence-*"))) == 2, "the ranks were started twice"
    # The value is there before the job has tidied up; then `status` and accounting agree.
    status = until(
        lambda: (s := cluster.act("alice", "status", answer["run_id"]))["slurm_state"] == "COMPLETED" and s,
        timeout_s=60,
        what="the end of the job",
    )
    assert status["state"] == "COMPLETED" and status["nodes"] == ["node1", "node2"]

    # The checkpoint: listed by the run, there on disk, with peft's file names, for its owner's eyes only.
    assert answer["checkpoints"] == [answer["value"]["checkpoint"]]
    model_id = answer["value"]["checkpoint"].removeprefix("tinker://").split("/")[0]
    data_root = cluster.home("alice") / "tinker_hpc_data"
    names = {path.name for path in checkpoint_folder(data_root, model_id, "weights", "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "checkpoint.json"} <= names

    run_folder = cluster.run_folder(answer["run_id"])
    events = cluster.events(answer["run_id"])
    assert events[:3] == ["successor", "claimed", "started"] and events[-1] == "ended" and "worker_ready" in events
    job_id = json.loads((run_folder / "submitted.json").read_text())["job_id"]
    row = cluster.sacct(job_id, "JobName", "State", "ExitCode", "NodeList", "NNodes")
    assert row == [answer["run_id"], "COMPLETED", "0:0", "node[1-2]", "2"]
    declaration = json.loads((run_folder / "workers" / "0" / "worker.json").read_text())
    assert (declaration["layout"]["tp_size"], declaration["layout"]["dp_size"]) == (2, 2)
    assert "the loop is running" in (run_folder / "logs" / "loop.log").read_text()
