"""What a resumed run keeps of its job, what it takes over from the new wishes, and what is put aside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch import attempts
from launch.job_spec import JobSpec
from tinker_hpc.base_models import resolve
from tinker_hpc.config import ClusterProfile, Config
from tinker_hpc.private_files import write_json
from tinker_hpc.resources import Resources, build_job_spec, driver_spec
from tinker_hpc.resume import put_end_aside, resumed_spec
from tinker_hpc.run_folder import RunFolder

MODEL = str(Path(__file__).parents[2] / "models" / "tiny-qwen3")
DELLA = ClusterProfile("della", partition="gpu", gpu_type="a100", driver_partition="cpu")
OTHER = ClusterProfile("other", partition="pli", time_limit_min=30)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path, "della", {"della": DELLA, "other": OTHER}, {}, tmp_path)


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
    assert fresh.layout.tp_size == 2, "as many ranks: the same layout, so the same bits"


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
