"""What a resumed run keeps of its job, what it takes over from the new wishes, and what is put aside."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from published_configs import PUBLISHED

from launch import attempts
from launch.job_spec import JobSpec
from launch.submitted import SubmittedJob
from tinker_hpc.base_models import resolve
from tinker_hpc.config import ClusterProfile, Config
from tinker_hpc.errors import ConfigError, SubmissionError
from tinker_hpc.private_files import write_json
from tinker_hpc.resources import Resources, build_job_spec, driver_spec
from tinker_hpc.resume import put_end_aside, resume, resumed_spec
from tinker_hpc.run_folder import RunFolder

MODEL = str(Path(__file__).parents[2] / "models" / "tiny-qwen3")
DELLA = ClusterProfile("della", partition="gpu", gpu_type="a100", driver_partition="cpu")
OTHER = ClusterProfile("other", partition="pli", time_limit_min=30)
NVLINK = ClusterProfile(
    "nvlink", partition="gpu", driver_partition="cpu", gpu_type="a100", constraint="a100&nvlink", extra=("--nice",)
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path / "root", "della", {"della": DELLA, "other": OTHER, "nvlink": NVLINK}, {}, tmp_path)


def spec_of(**sizes: int) -> JobSpec:
    return build_job_spec(
        Resources(**{"gpus_per_node": 2, "time": 90, "tp_size": 2, **sizes}),
        profile=DELLA,
        base_model=resolve(MODEL, {}),
        asked_base_model=MODEL,
        run_id="r-1",
        kind="run",
        name="r",
        command=("python", "loop.py"),
        environment={"A": "b"},
    )


def test_nothing_asked_nothing_changed(config: Config) -> None:
    spec = spec_of()
    assert resumed_spec(spec, cluster=None, resources=Resources(), config=config) == spec


def test_another_number_of_gpus_is_another_layout(config: Config) -> None:
    spec = spec_of()
    fresh = resumed_spec(spec, cluster=None, resources=Resources(gpus_per_node=1), config=config)
    assert (fresh.gpus_per_node, fresh.ranks_per_node, fresh.layout.world_size) == (1, 1, 1)
    assert (fresh.run_id, fresh.command, fresh.environment) == ("r-1", spec.command, spec.environment)
    assert fresh.time_limit_min == 90


def test_another_cluster(config: Config) -> None:
    fresh = resumed_spec(spec_of(), cluster="other", resources=Resources(time=10), config=config)
    assert (fresh.cluster.name, fresh.cluster.partition, fresh.time_limit_min) == ("other", "pli", 10)
    assert fresh.layout.tp_size == 2, "as many ranks, so what was given by hand stays"


def submitted_on(config: Config, cluster: str, **sizes: int) -> JobSpec:
    """A run with a model of 61 GiB; what it was given by hand is in `sizes`."""
    model = config.data_root.parent / "Qwen3-32B"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-32B"]))
    (model / "model.safetensors").touch()
    return build_job_spec(
        Resources(**sizes),
        profile=config.profile(cluster),
        base_model=resolve(str(model), {}),
        asked_base_model=str(model),
        run_id="r-1",
        kind="run",
        name="r",
    )


@pytest.fixture
def gpus(config: Config) -> Config:
    """Clusters with GPUs of two sizes."""
    profiles = [ClusterProfile(f"of{gib}", gpu_memory_gib=gib) for gib in (40, 80, 141)]
    return replace(config, clusters={profile.name: profile for profile in profiles})


@pytest.mark.parametrize(
    ("before", "now", "num_gpus"), [("of141", "of80", 4), ("of80", "of141", 4), ("of80", "of40", 8)]
)
def test_on_other_gpus_the_layout_is_that_of_a_new_run(gpus: Config, before: str, now: str, num_gpus: int) -> None:
    spec, there = (submitted_on(gpus, cluster, gpus_per_node=num_gpus) for cluster in (before, now))
    assert spec.layout != there.layout
    fresh = resumed_spec(spec, cluster=now, resources=Resources(), config=gpus)
    assert fresh == there
    assert resumed_spec(fresh, cluster=before, resources=Resources(), config=gpus) == spec, "and back"


def test_what_does_not_fit_the_other_gpus_is_refused(gpus: Config) -> None:
    spec = submitted_on(gpus, "of141")
    with pytest.raises(ConfigError, match=r"does not fit 1 node.* of 40 GiB.*give tp_size by hand"):
        resumed_spec(spec, cluster="of40", resources=Resources(), config=gpus)
    tried = resumed_spec(spec, cluster="of40", resources=Resources(tp_size=1), config=gpus)
    assert tried.layout.tp_size == 1, "who gives a size by hand gets it"
    more = resumed_spec(spec, cluster="of40", resources=Resources(gpus_per_node=4), config=gpus)
    assert more.layout == submitted_on(gpus, "of40", gpus_per_node=4).layout


def test_sizes_given_by_hand_go_along(gpus: Config) -> None:
    spec = submitted_on(gpus, "of80", gpus_per_node=8, tp_size=8)
    fresh = resumed_spec(spec, cluster="of141", resources=Resources(), config=gpus)
    assert fresh == submitted_on(gpus, "of141", gpus_per_node=8, tp_size=8)
    assert fresh.layout != submitted_on(gpus, "of141", gpus_per_node=8).layout
    now = resumed_spec(
        submitted_on(gpus, "of80", gpus_per_node=8), cluster=None, resources=Resources(tp_size=8), config=gpus
    )
    assert now.sizes_by_hand == {"tp_size": 8}, "not the sizes that were planned and stay"
    assert JobSpec.from_json(now.to_json()) == now


def test_a_driver_stays_a_driver(config: Config) -> None:
    worker = replace(spec_of(), kind="session", command=None, run_id="r-1-w0", serves_run="r-1")
    driver = driver_spec(worker, run_id="r-1", command=("python", "loop.py"))
    assert (driver.kind, driver.cluster.partition, driver.gpus_per_node, driver.layout.world_size) == (
        "driver",
        "cpu",
        0,
        1,
    )
    same = resumed_spec(driver, cluster=None, resources=Resources(gpus_per_node=1, time=20), config=config)
    assert same == replace(driver, time_limit_min=20), "the sizes are the worker's"


def test_a_driver_elsewhere_is_what_it_would_be_had_it_been_submitted_there(config: Config) -> None:
    worker = replace(spec_of(), kind="session", command=None, run_id="r-1-w0", serves_run="r-1")
    driver = driver_spec(worker, run_id="r-1", command=("python", "loop.py"))
    there = driver_spec(replace(worker, cluster=NVLINK), run_id="r-1", command=("python", "loop.py"))
    assert (there.cluster.partition, there.cluster.constraint, there.cluster.extra) == ("cpu", None, ())
    assert resumed_spec(driver, cluster="nvlink", resources=Resources(), config=config) == there


SQUEUE = """#!/bin/sh
[ ! -e {0}/worker ] || [ -e {0}/cancelled ] || echo "21|$(cat {0}/worker)|PENDING|Priority|||||"
"""
SBATCH = """#!/bin/sh
case "$*" in
    *-w0/*) sed -n 's/.*--job-name=//p' {0}/../root/runs/*-w0/slurm/job.sbatch > {0}/worker; echo 21 ;;
    *) echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1 ;;
esac
"""


def test_a_loop_that_gets_no_job_leaves_none_to_its_worker(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_folder = config.data_root.parent / "bin"
    bin_folder.mkdir()
    for name, text in (("squeue", SQUEUE), ("sbatch", SBATCH), ("scancel", "#!/bin/sh\necho $@ > {0}/cancelled\n")):
        (bin_folder / name).write_text(text.format(bin_folder))
        (bin_folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    run = RunFolder.new(config.data_root, "r")
    worker_run = run.add_worker_run(0)
    worker = replace(spec_of(), kind="session", command=None, run_id=worker_run.run_id, serves_run=run.run_id)
    for folder, spec, job in (
        (worker_run, worker, "11"),
        (run, driver_spec(worker, run_id=run.run_id, command=("x",)), "12"),
    ):
        folder.worker(0).create(base_model=MODEL, base_model_folder=MODEL)
        write_json(folder.spec, spec.to_json())
        write_json(folder.submitted, SubmittedJob(job, "della", 1.0, spec.run_id, "slurm", str(folder.path)).to_json())
        write_json(folder.outcome, {"state": "failed", "reason": "cancelled", "exit_code": 143, "ended_at": 2.0})
    with pytest.raises(SubmissionError, match="Invalid account"):
        resume(run.run_id, config=config)
    assert (bin_folder / "cancelled").read_text().split() == [f"--jobname={worker_run.run_id}", "21"]


@pytest.mark.parametrize("began", [True, False])
def test_the_end_is_put_aside_not_lost(tmp_path: Path, began: bool) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    if began:
        attempts.begin(folder, {"job_id": "1", "host": "n", "pid": 1})
    for path in (folder.outcome, folder.cancel, folder.result):
        write_json(path, {"of": path.name})
    put_end_aside(folder)
    assert not any(path.exists() for path in (folder.outcome, folder.cancel, folder.result))
    kept = sorted(path.name for path in folder.attempts.glob("before-*"))
    number = "000001" if began else "000000"
    assert kept == [f"before-{number}-{name}" for name in ("cancel.json", "outcome.json", "result.pkl")]
