"""The sbatch scripts as whole texts. A golden file shows a reviewer what users' jobs will look like."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.job_spec import JobSpec, Layout
from launch.render import gres, preview, sbatch_text, template_name, time_limit_text
from tinker_hpc.config import ClusterProfile
from tinker_hpc.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden"
RUN_FOLDER = Path("/scratch/alice/tinker_hpc/runs/sft-20260314-a1b2c3")


def spec(**changes: object) -> JobSpec:
    values: dict[str, object] = {
        "run_id": "sft-20260314-a1b2c3",
        "kind": "run",
        "name": "sft",
        "base_model": "Qwen/Qwen3-8B",
        "base_model_folder": "/scratch/shared/Qwen3-8B",
        "cluster": ClusterProfile("della", python="/home/alice/env/bin/python"),
        **changes,
    }
    return JobSpec(**values)  # type: ignore[arg-type]


FULL_PROFILE = ClusterProfile(
    "della",
    partition="gpu",
    account="lab",
    qos="long",
    constraint="a100&nvlink",
    memory="200G",
    gpu_type="a100",
    setup=("module purge", "module load cuda/13"),
    extra=("--exclude=node7", "--mail-type=FAIL"),
    python="/home/alice/my env/bin/python",
    environment={"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's $HOME"},
)

CASES = {
    "cpu": spec(cpus_per_node=4),
    "cpu_two_nodes": spec(nodes=2, ranks_per_node=2, cpus_per_node=4, layout=Layout(2, 2), memory="8G"),
    "one_node_gpu": spec(ranks_per_node=4, gpus_per_node=4, cpus_per_node=18, layout=Layout(4, 1), time_limit_min=480),
    "multi_node_gpu": spec(
        cluster=FULL_PROFILE,
        nodes=2,
        ranks_per_node=8,
        gpus_per_node=8,
        cpus_per_node=66,
        layout=Layout(8, 2),
        time_limit_min=36 * 60,
        environment={"GREETING": "hello"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_whole_script(name: str) -> None:
    golden = GOLDEN / f"{name}.sbatch"
    text = preview(CASES[name], RUN_FOLDER)
    if not golden.exists():
        golden.write_text(text)
        pytest.fail(f"wrote {golden} anew: read it, commit it, run this again")
    assert text == golden.read_text(), (
        f"The script of {name} is not the one in {golden}. If the new one is right, delete the file, run this test "
        "twice, and commit what it wrote."
    )


@pytest.mark.parametrize("name", CASES)
def test_bash_can_parse_it(name: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=preview(CASES[name], RUN_FOLDER), text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_template_has_a_golden_script() -> None:
    templates = {path.name for path in (GOLDEN.parents[1] / "slurm_templates").glob("*.j2")}
    assert templates == {template_name(case) for case in CASES.values()}


def test_odd_paths_stay_one_word() -> None:
    folder = Path("/data/it's 100%/slurm")
    text = sbatch_text(CASES["cpu"], "true", folder)
    # In bash's reading of the line the path is one word; Slurm then replaces %j and turns %% into %.
    line = next(line for line in text.splitlines() if line.startswith("#SBATCH --output="))
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line.removeprefix('#SBATCH ')}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines() == ["--output=/data/it's 100%%/slurm/%j.log"]


def test_a_line_break_cannot_smuggle_in_an_option() -> None:
    evil = spec(cluster=ClusterProfile("della", partition="gpu\n#SBATCH --account=other"))
    options = [line for line in preview(evil, RUN_FOLDER).splitlines() if line.startswith("#SBATCH")]
    assert not any(line.startswith("#SBATCH --account") for line in options)


@pytest.mark.parametrize(
    ("minutes", "text"), [(1, "00:01:00"), (90, "01:30:00"), (1440, "1-00:00:00"), (36 * 60 + 5, "1-12:05:00")]
)
def test_time_limit_text(minutes: int, text: str) -> None:
    assert time_limit_text(minutes) == text


def test_gres() -> None:
    assert [gres(CASES[name]) for name in ("cpu", "one_node_gpu", "multi_node_gpu")] == ["", "gpu:4", "gpu:a100:8"]


def test_spec_survives_json() -> None:
    import json

    for case in CASES.values():
        assert JobSpec.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_spec_of_a_later_version_can_be_read() -> None:
    value = {**CASES["cpu"].to_json(), "a_new_field": 1, "created_at": 1.0}
    assert JobSpec.from_json(value) == CASES["cpu"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 2}, "nodes \\(2\\) \\* ranks_per_node \\(1\\) = 2"),
        ({"nodes": 0}, "nodes is 0"),
        ({"run_id": "a b"}, "letters, digits"),
        ({"ranks_per_node": 2, "gpus_per_node": 1, "layout": Layout(2, 1)}, "each rank needs a GPU"),
        ({"memory": "lots"}, "64G"),
        ({"kind": "session", "command": ("true",)}, "takes no command"),
        (
            {"cluster": ClusterProfile("local", executor="local"), "nodes": 2, "layout": Layout(2, 1)},
            "this machine alone",
        ),
    ],
)
def test_sizes_that_cannot_go_together(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        spec(**changes)


def test_memory_of_the_job_wins_over_the_profile() -> None:
    profile = replace(FULL_PROFILE, memory="200G")
    assert spec(cluster=profile).memory_per_node == "200G"
    assert spec(cluster=profile, memory="8G").memory_per_node == "8G"
