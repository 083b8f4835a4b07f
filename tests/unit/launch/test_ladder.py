"""A run is submitted with jobs that wait behind the first, and Slurm takes only some of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import lineage
from launch.job_spec import JobSpec
from launch.submit import submit
from tinker_hpc.config import Config, load_config
from tinker_hpc.errors import SubmissionError
from tinker_hpc.private_files import make_private, read_json, write_json
from tinker_hpc.resources import Resources
from tinker_hpc.runs import Run
from tinker_hpc.submission import submit_loop

Sbatch = Callable[[int, str], None]
MODEL = str(Path(__file__).parents[2] / "models" / "tiny-qwen3")
LIMIT = """echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2
echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2
exit 1"""
AWAY = """echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2
exit 1"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A cluster that is known to need a ladder."""
    path = tmp_path / "config.toml"
    path.write_text(f'data_root = "{tmp_path}/data"\n[clusters.della]\nexecutor = "slurm"\ngpus_per_node = 0\n')
    monkeypatch.setenv("TINKER_HPC_CONFIG", str(path))
    config = load_config()
    sites = make_private(make_private(config.data_root) / "sites")
    write_json(sites / "della.json", {"continuation": "ladder"})
    return config


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    """Put an sbatch before all others that accepts some jobs and then does something else."""

    def accept(num_jobs: int, then: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        count = tmp_path / "count"
        count.write_text("")
        (folder / "sbatch").write_text(
            f'#!/bin/sh\necho "$@" >> {count}\nn=$(wc -l < {count})\n'
            f"[ $n -le {num_jobs} ] && echo $((100 + n)) && exit 0\n{then}\n"
        )
        (folder / "sbatch").chmod(0o700)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return accept


def submitted(config: Config) -> Run:
    return submit_loop(
        base_models=[MODEL], cluster="della", resources=Resources(), name="x", command=("true",), config=config
    )


@pytest.mark.parametrize(("refusal", "words"), [(LIMIT, "AssocMaxSubmitJobLimit"), (AWAY, "Unable to contact slurm")])
def test_a_run_goes_on_with_the_rungs_there_are(
    config: Config, sbatch: Sbatch, capsys: pytest.CaptureFixture[str], refusal: str, words: str
) -> None:
    sbatch(2, refusal)
    run = submitted(config)
    assert [job.job_id for job in lineage.jobs_of(run.folder)] == ["101", "102"]
    assert all((run.folder.slurm / f"{job_id}_submitted.pkl").exists() for job_id in (101, 102))
    said = capsys.readouterr().err
    assert (
        f"run {run.id} is submitted" in said
        and "1 instead of 3 jobs" in said
        and words in said
        and "sbatch: error" not in said
    )
    assert f"tinker-hpc resume {run.id}" in said and said.count("\n") == 1


def test_so_does_one_that_is_resumed(config: Config, sbatch: Sbatch, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch(4, LIMIT)
    run = submitted(config)
    assert len(lineage.jobs_of(run.folder)) == 4 and capsys.readouterr().err == "", "a whole ladder is nothing to tell"

    sbatch(1, LIMIT)
    spec = JobSpec.from_json(read_json(run.folder.spec) or {})
    job = submit(spec, run.folder, again=True)
    assert job.job_id == "101" and "0 instead of 3 jobs" in capsys.readouterr().err


def test_a_refused_first_job_leaves_nothing(config: Config, sbatch: Sbatch) -> None:
    sbatch(0, LIMIT)
    with pytest.raises(SubmissionError, match="limit of your account"):
        submitted(config)
    assert list((config.data_root / "runs").iterdir()) == []
