"""What launch leaves on disk and reads back: the claim, the record, local states, environments of the children."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import local_jobs
from launch.children import agent_argv, agent_environment, gateway_environment, loop_argv, loop_environment
from launch.executors import local_environment
from launch.job_spec import JobSpec, Layout
from launch.job_state import JobState
from launch.run_record import RunRecord, listed
from launch.submitted import SubmittedJob
from tinker_hpc.config import ClusterProfile
from tinker_hpc.private_files import read_json
from tinker_hpc.run_folder import RunFolder

LOCAL = ClusterProfile("local", executor="local")
JOB = SubmittedJob("77", "local", 100.0, "r-1", "local", "/data/runs/r-1", "here", 5)


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    return RunFolder.new(root, "r")


def test_record(run_folder: RunFolder) -> None:
    run_folder.worker(0).create(base_model="m", base_model_folder="/m")
    record = RunRecord(run_folder, writes_status=True)
    record.worker_status("starting", "loading")
    record.worker_status("ended", "the worker failed", error="no memory")
    record.worker_status("ready", "too late")
    assert read_json(run_folder.worker(0).status)["phase"] == "ended", "an end is an end"
    record.outcome(exit_code=3, reason="loop", error="ValueError: x", traceback="Traceback ...")
    outcome = read_json(run_folder.outcome)
    assert (outcome["state"], outcome["reason"], outcome["exit_code"]) == ("failed", "loop", 3)
    events = [json.loads(line) for line in run_folder.events.read_text().splitlines()]
    assert [event["event"] for event in events] == ["ended"] and events[0]["time"] > 0
    assert run_folder.events.stat().st_mode & 0o077 == 0


def test_listed(tmp_path: Path) -> None:
    assert not listed(tmp_path / "a") and not listed(tmp_path / "no" / "a")
    (tmp_path / "a").touch()
    assert listed(tmp_path / "a")


def local_state(**seen: Any) -> tuple[JobState, str]:
    values: dict[str, Any] = {"alive": False, "outcome": None, "claim": None, "cancel_requested": False, "now": 200.0}
    status = local_jobs.combine(JOB, **{**values, **seen})
    return status.state, status.slurm_state


def test_states_of_a_local_job() -> None:
    failed = {"state": "failed", "reason": "loop", "exit_code": 1, "ended_at": 150.0}
    assert local_state(alive=True) == (JobState.RUNNING, "RUNNING")
    assert local_state(alive=True, outcome=failed) == (JobState.RUNNING, "COMPLETING")
    assert local_state(outcome=failed)[0] is JobState.FAILED
    assert local_state(outcome={"state": "succeeded", "reason": "loop", "exit_code": 0})[0] is JobState.COMPLETED
    assert local_state(outcome={**failed, "reason": "time_limit"})[0] is JobState.TIMEOUT
    assert local_state(outcome={**failed, "reason": "out_of_memory"})[0] is JobState.OUT_OF_MEMORY
    assert local_state()[0] is JobState.FAILED, "gone without a word is a failure, never a success"
    assert local_state(cancel_requested=True)[0] is JobState.CANCELLED
    status = local_jobs.combine(
        JOB, alive=False, outcome=failed, claim={"claimed_at": 110.0}, cancel_requested=False, now=200.0
    )
    assert (status.start, status.end, status.elapsed_s, status.exit_code) == (110.0, 150.0, 40.0, 1)


def test_a_local_job_of_another_machine_is_unknown() -> None:
    status = local_jobs.status(JOB)
    assert status.state is JobState.UNKNOWN and "here" in status.reason


def gpu_spec(**changes: Any) -> JobSpec:
    values = {"nodes": 2, "ranks_per_node": 2, "gpus_per_node": 4, "cpus_per_node": 16, "layout": Layout(2, 2)}
    return JobSpec("r-1", "run", "r", "m", "/m", ClusterProfile("della"), **{**values, **changes})


def test_gpus_are_shared_out() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "PATH": "/bin", "no_proxy": "intra.net"}
    assert agent_environment(gpu_spec(), environ, cores=64)["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert gateway_environment(gpu_spec(), environ)["CUDA_VISIBLE_DEVICES"] == ""
    loop = loop_environment(gpu_spec(), environ, base_url="http://127.0.0.1:1", api_key="tml-x")
    assert loop["CUDA_VISIBLE_DEVICES"] == "6,7", "the loop gets what no rank uses"
    assert loop["no_proxy"] == "intra.net,127.0.0.1,localhost" and loop["NO_PROXY"] == "127.0.0.1,localhost"
    assert (loop["TINKER_BASE_URL"], loop["TINKER_API_KEY"], loop["TINKER_TELEMETRY"]) == (
        "http://127.0.0.1:1",
        "tml-x",
        "0",
    )
    assert agent_environment(gpu_spec(), {}, cores=64)["CUDA_VISIBLE_DEVICES"] == "0,1", "where Slurm does not say"
    on_cpus = agent_environment(gpu_spec(gpus_per_node=0), environ, cores=64)
    assert on_cpus["CUDA_VISIBLE_DEVICES"] == "", "whatever the node has, or the shell that it was submitted from"


def test_segments_of_a_gpus_memory_grow_unless_the_user_says_otherwise() -> None:
    def settings(spec: JobSpec, environ: dict[str, str]) -> dict[str, str]:
        return {k: v for k, v in agent_environment(spec, environ, cores=8).items() if k.endswith("ALLOC_CONF")}

    assert settings(gpu_spec(), {}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert settings(gpu_spec(), {name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}
    assert settings(gpu_spec(gpus_per_node=0), {}) == {}


@pytest.mark.parametrize(
    ("cores", "given", "threads"), [(64, None, "8"), (4, None, "2"), (1, None, "1"), (64, "3", "3")]
)
def test_threads_per_rank(cores: int, given: str | None, threads: str) -> None:
    environ = {} if given is None else {"OMP_NUM_THREADS": given}
    assert agent_environment(gpu_spec(), environ, cores=cores)["OMP_NUM_THREADS"] == threads


def test_command_lines() -> None:
    folder = RunFolder(Path("/data/runs/r-1"))
    first = agent_argv(gpu_spec(), folder, node_rank=0, own_address="10.0.0.1", endpoint=("gpu1", 29000))
    other = agent_argv(gpu_spec(), folder, node_rank=1, own_address="gpu2", endpoint=("gpu1", 29000))
    assert "--rdzv-conf=is_host=1" in first and "--rdzv-conf=is_host=0" in other
    for argv in (first, other):
        assert "--nnodes=2" in argv and "--nproc-per-node=2" in argv and "--rdzv-endpoint=gpu1:29000" in argv
        assert argv[-2:] == ["--worker-dir", "/data/runs/r-1/workers/0"]
    assert loop_argv(gpu_spec(command=("python", "x.py")), folder) == ["python", "x.py"]
    assert loop_argv(gpu_spec(), folder)[-2:] == ["--run-dir", "/data/runs/r-1"]


def test_environment_of_a_local_job() -> None:
    def spec(gpus: int) -> JobSpec:
        return JobSpec(
            "r-1", "run", "r", "m", "/m", LOCAL, gpus_per_node=gpus, time_limit_min=3, environment={"A": "b"}
        )

    env = local_environment(spec(0), "python -m x", {"CUDA_VISIBLE_DEVICES": "2,3", "HOME": "/root"})
    assert (env["CUDA_VISIBLE_DEVICES"], env["A"], env["HOME"], env["TINKER_HPC_RUN_ID"]) == ("", "b", "/root", "r-1")
    assert int(env["SUBMITIT_LOCAL_TIMEOUT_S"]) > 180, "the supervisor's own limit comes first"
    assert local_environment(spec(1), "x", {"CUDA_VISIBLE_DEVICES": "2,3"})["CUDA_VISIBLE_DEVICES"] == "2"
    assert local_environment(spec(2), "x", {})["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_submitted_job_survives_json(run_folder: RunFolder) -> None:
    assert SubmittedJob.of(run_folder) is None
    run_folder.submitted.write_text(json.dumps({**JOB.to_json(), "of_a_later_version": 1}))
    assert SubmittedJob.of(run_folder) == JOB


def test_launch_loads_neither_torch_nor_submitit_to_ask_for_states() -> None:
    heavy = "{'torch', 'submitit', 'jinja2', 'numpy'}"
    code = f"import sys, launch.monitor, launch.failure, launch.submit; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
