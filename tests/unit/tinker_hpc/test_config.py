"""The configuration file, the environment over it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinker_hpc.config import ClusterProfile, build_config, load_config, parse_time_limit_min
from tinker_hpc.errors import ConfigError, UnknownClusterError

HOME = {"HOME": "/home/alice", "PATH": "/nowhere"}


def build(table, environ=None, **kwargs):
    return build_config(table, environ=environ or HOME, **kwargs)


def test_every_field_of_a_profile_arrives() -> None:
    values = {
        "executor": "slurm",
        "partition": "gpu",
        "driver_partition": "cpu",
        "account": "lab",
        "qos": "long",
        "constraint": "a100&nvlink",
        "memory": "64G",
        "gpu_type": "a100",
        "gpus_per_node": 4,
        "gpu_memory_gib": 80,
        "cpus_per_node": 32,
        "time_limit_min": 480,
        "setup": ["module load cuda"],
        "extra": ["--exclude=node7"],
        "python": "/scratch/env/bin/python",
        "environment": {"NCCL_DEBUG": "WARN"},
    }
    assert set(values) | {"name"} == set(ClusterProfile.__dataclass_fields__)
    profile = build({"clusters": {"della": values}}).profile("della")
    assert profile.name == "della"
    for name, value in values.items():
        assert getattr(profile, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"dataroot": "/x"},
            ["dataroot", "base_models, cluster, clusters, data_root, expert_lora, routing_replay, stable_reinforce"],
        ),
        ({"clusters": {"c": {"acount": "lab"}}}, ["[clusters.c]", "acount", "account"]),
        ({"clusters": {"c": {"gpus_per_node": "4"}}}, ["gpus_per_node", "'4'", "whole number"]),
        ({"clusters": {"c": {"gpus_per_node": True}}}, ["gpus_per_node", "True"]),
        ({"clusters": {"c": {"gpus_per_node": -1}}}, ["gpus_per_node", "at least 0"]),
        ({"clusters": {"c": {"time_limit_min": 0}}}, ["time_limit_min", "at least 1"]),
        ({"clusters": {"c": {"setup": "module load cuda"}}}, ["setup", "list of strings"]),
        ({"clusters": {"c": {"setup": [1]}}}, ["setup", "list of strings"]),
        ({"clusters": {"c": {"extra": ["exclude=node7"]}}}, ["exclude=node7", "--exclude=node7"]),
        ({"clusters": {"c": {"extra": ["--x\n#SBATCH --y"]}}}, ["one sbatch option"]),
        ({"clusters": {"c": {"executor": "pbs"}}}, ["pbs", "slurm", "local"]),
        ({"clusters": {"c": {"memory": "64 gigs"}}}, ["64 gigs", "64G"]),
        ({"clusters": {"c": {"environment": {"A": 1}}}}, ["environment A", "string"]),
        ({"clusters": {"c": {"environment": {"A B": "x"}}}}, ["[clusters.c]", "'A B'", "letters, digits and `_`"]),
        ({"clusters": {"bad name": {}}}, ["bad name"]),
        ({"clusters": {"c": 3}}, ["[clusters.c]", "table"]),
        ({"stable_reinforce": "ppo"}, ["stable_reinforce is 'ppo'", '"importance_sampling"']),
        ({"stable_reinforce": True}, ["stable_reinforce is True; expected a string"]),
        ({"routing_replay": "yes"}, ["routing_replay is 'yes'; expected true or false"]),
        ({"routing_replay": 1}, ["routing_replay is 1; expected true or false"]),
        ({"expert_lora": "own"}, ["expert_lora is 'own'", '"shared_outer" or "per_expert"']),
        ({"base_models": {"Qwen/Qwen3-8B": 3}}, ["Qwen/Qwen3-8B", "folder"]),
        ({"data_root": "$NO_SUCH/x"}, ["$NO_SUCH", "not set"]),
        ({"data_root": ""}, ["data_root is ''", "expected the path of a folder"]),
        ({"state_dir": " "}, ["state_dir is ' '", "expected the path of a folder"]),
        ({"base_models": {"m": ""}}, ["[base_models] \"m\" is ''", "expected the path of a folder"]),
    ],
)
def test_mistakes_are_refused_with_what_is_valid(table, words) -> None:
    with pytest.raises(ConfigError) as caught:
        build(table)
    for word in words:
        assert word in str(caught.value)


def test_a_loss_stands_for_another_only_where_the_file_says_so() -> None:
    assert build({}).stable_reinforce is None
    assert build({"stable_reinforce": "importance_sampling"}).stable_reinforce == "importance_sampling"


def test_environment_wins_over_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('data_root = "/from/file"\ncluster = "a"\n[clusters.a]\n[clusters.b]\n')
    environ = {**HOME, "TINKER_HPC_CONFIG": str(file)}
    assert load_config(environ=environ).data_root == Path("/from/file")
    assert load_config(environ=environ).profile().name == "a"
    environ |= {"TINKER_HPC_DATA_ROOT": "/from/env", "TINKER_HPC_CLUSTER": "b", "TINKER_HPC_STATE_DIR": "/st"}
    config = load_config(environ=environ)
    assert (config.data_root, config.profile().name, config.state_dir) == (Path("/from/env"), "b", Path("/st"))


def test_a_missing_file_is_fine_unless_it_was_named(tmp_path: Path) -> None:
    assert load_config(environ={**HOME, "XDG_CONFIG_HOME": str(tmp_path)}).path is None
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(environ={**HOME, "TINKER_HPC_CONFIG": str(tmp_path / "gone.toml")})
    with pytest.raises(ConfigError, match="no configuration file ~nosuchuser/x"):
        load_config(environ={**HOME, "TINKER_HPC_CONFIG": "~nosuchuser/x"})


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("data_root = ")
    with pytest.raises(ConfigError, match=str(file)):
        load_config(file, environ=HOME)


def test_variables_and_home_in_paths() -> None:
    config = build({"data_root": "${SCRATCH}/t", "base_models": {"m": "$SCRATCH/m"}}, {**HOME, "SCRATCH": "/scr"})
    assert config.data_root == Path("/scr/t")
    assert config.base_models == {"m": "/scr/m"}
    assert build({}).data_root == Path("~/tinker_hpc_data").expanduser()


@pytest.mark.parametrize(
    ("clusters", "has_sbatch", "expected"),
    [
        ({}, False, "local"),
        ({"della": {}}, False, "local"),
        ({}, True, "slurm"),
        ({"della": {}}, True, "della"),
        ({"della": {}, "adroit": {}}, True, "slurm"),
        ({"box": {"executor": "local"}}, True, "slurm"),
    ],
)
def test_default_cluster(clusters, has_sbatch, expected) -> None:
    assert build({"clusters": clusters}, has_sbatch=has_sbatch).profile().name == expected


def test_unknown_cluster_lists_the_known() -> None:
    with pytest.raises(UnknownClusterError, match=r"known are della, local, slurm.*clusters\.x\]"):
        build({"clusters": {"della": {}}}).profile("x")


def test_a_gpu_is_asked_for_where_there_may_be_one() -> None:
    config = build({"clusters": {"cpu": {"gpus_per_node": 0}}})
    assert [config.profile(name).default_gpus_per_node for name in ("local", "slurm", "cpu")] == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        (30, 30),
        ("30", 30),
        ("90:00", 90),
        ("0:30", 1),
        ("8:00:00", 480),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-0:0:1", 2881),
        (None, 7),
    ],
)
def test_time_limits_as_slurm_spells_them(text, minutes) -> None:
    assert parse_time_limit_min(text, default=7) == minutes


@pytest.mark.parametrize("text", ["", "8h", "-5", 0, "0:00:00", "1:2:3:4", True])
def test_other_time_limits_are_refused(text) -> None:
    with pytest.raises(ConfigError):
        parse_time_limit_min(text, default=7)
