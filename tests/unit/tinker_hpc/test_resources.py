"""From what the user asked for to a job spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinker_hpc.base_models import BaseModel
from tinker_hpc.config import ClusterProfile
from tinker_hpc.errors import ConfigError
from tinker_hpc.resources import Resources, build_job_spec, check_run_name, choose_tp_size, weights_gib

SLURM = ClusterProfile("della", partition="gpu", memory="32G", time_limit_min=90)


def model(folder: Path = Path("/m"), heads: int = 8) -> BaseModel:
    return BaseModel("m", folder, {"num_attention_heads": 32, "num_key_value_heads": heads}, 8, 8, 8, "qwen3")


def spec(resources: Resources, profile: ClusterProfile = SLURM, base_model: BaseModel | None = None):
    return build_job_spec(
        resources,
        profile=profile,
        base_model=base_model or model(),
        asked_base_model="org/m",
        run_id="sft-1",
        kind="run",
        name="sft",
    )


def test_the_profile_fills_in() -> None:
    job = spec(Resources())
    assert (job.nodes, job.gpus_per_node, job.ranks_per_node, job.cpus_per_node) == (1, 1, 1, 4)
    assert (job.time_limit_min, job.memory_per_node) == (90, "32G")
    assert (job.base_model, job.base_model_folder) == ("org/m", "/m")
    assert spec(Resources(), ClusterProfile("c", cpus_per_node=7)).cpus_per_node == 7


def test_the_user_wins() -> None:
    job = spec(Resources(2, 4, None, 16, "64G", "8:00:00", 4))
    assert (job.nodes, job.gpus_per_node, job.ranks_per_node, job.cpus_per_node) == (2, 4, 4, 16)
    assert (job.time_limit_min, job.memory_per_node) == (480, "64G")
    assert (job.layout.tp_size, job.layout.dp_size) == (4, 2)


def test_cpu_ranks() -> None:
    job = spec(Resources(nodes=2, gpus_per_node=0, ranks_per_node=2, tp_size=2))
    assert (job.gpus_per_node, job.ranks_per_node, job.cpus_per_node, job.world_size) == (0, 2, 2, 4)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(gpus_per_node=4, tp_size=3), "tp_size is 3, which does not divide the 4 ranks"),
        (Resources(gpus_per_node=16, tp_size=16), "does not divide the 8 key-value heads of m"),
    ],
)
def test_sizes_that_do_not_go_together(resources: Resources, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec(resources)


@pytest.mark.parametrize("bad", [{"nodes": 0}, {"nodes": "2"}, {"gpus_per_node": -1}, {"tp_size": True}])
def test_sizes_are_checked(bad) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Resources(**bad)


@pytest.mark.parametrize(
    ("gib", "ranks", "heads", "expected"),
    [
        (16, 4, 8, 1),  # 8B in bf16: every GPU holds a copy
        (64, 4, 8, 4),  # 32B
        (64, 8, 8, 4),
        (30, 8, 8, 2),
        (140, 8, 8, 8),  # 70B
        (64, 6, 8, 2),  # 3 and 6 would cut heads; 2 does not quite fit, and the worker says so
        (0, 4, 8, 1),
    ],
)
def test_tensor_parallel_size_is_the_smallest_that_fits(gib, ranks, heads, expected) -> None:
    assert choose_tp_size(weights_gib=gib, ranks_per_node=ranks, num_heads=heads) == expected


def test_weights_are_measured_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1024)
    (tmp_path / "other.bin").write_bytes(b"x" * 4096)
    assert weights_gib(model(tmp_path)) == 1024 / 2**30


@pytest.mark.parametrize(
    ("given", "otherwise", "expected"),
    [
        (None, "train", "train"),
        (None, "<lambda>", "lambda"),
        (None, "/home/a/my prog", "my-prog"),
        (None, "...", "run"),
        ("sft-1.b_c", "train", "sft-1.b_c"),
    ],
)
def test_run_names(given, otherwise, expected) -> None:
    assert check_run_name(given, otherwise=otherwise) == expected


@pytest.mark.parametrize("name", ["", "a b", "-x", "../x", "x" * 65, "ä"])
def test_names_that_cannot_be_folders(name) -> None:
    with pytest.raises(ConfigError, match="name is"):
        check_run_name(name, otherwise="run")
