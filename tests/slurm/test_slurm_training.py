"""The story of a request on a real Slurm: a function submitted over two nodes trains, and its value comes back."""

from __future__ import annotations

import json

from slurm_machine import TINY_MODEL, SlurmCluster, until


def test_fine_tuning_over_two_nodes(cluster: SlurmCluster) -> None:
    """TP 2 x DP 2 over gloo: 2 nodes, 2 ranks each."""
    answer = cluster.program("alice", "submit_sft.py", str(TINY_MODEL), "6", timeout_s=280)
    losses = answer["value"]["losses"]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0], f"the loss did not fall: {losses}"
    # The value is there before the job has tidied up; then `status` and accounting agree.
    status = until(
        lambda: (s := cluster.act("alice", "status", answer["run_id"]))["slurm_state"] == "COMPLETED" and s,
        timeout_s=60,
        what="the end of the job",
    )
    assert status["state"] == "COMPLETED" and status["nodes"] == ["node1", "node2"]

    # The checkpoint: listed by the run, there on disk, with peft's file names, for its owner's eyes only.
    assert answer["checkpoints"] == [answer["value"]["checkpoint"]]
    saved = list(cluster.home("alice").glob("tinker_hpc_data/checkpoints/*/weights/final"))
    assert len(saved) == 1
    names = {path.name for path in saved[0].iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "checkpoint.json"} <= names

    run_folder = cluster.run_folder(answer["run_id"])
    events = cluster.events(answer["run_id"])
    assert events[0] == "started" and events[-1] == "ended" and "worker_ready" in events
    job_id = json.loads((run_folder / "submitted.json").read_text())["job_id"]
    row = cluster.sacct(job_id, "JobName", "State", "ExitCode", "NodeList", "NNodes")
    assert row == [answer["run_id"], "COMPLETED", "0:0", "node[1-2]", "2"]
    declaration = json.loads((run_folder / "workers" / "0" / "worker.json").read_text())
    assert (declaration["layout"]["tp_size"], declaration["layout"]["dp_size"]) == (2, 2)
    assert "the loop is running" in (run_folder / "logs" / "loop.log").read_text()
