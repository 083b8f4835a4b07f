"""From what the user asked for to a job spec."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from published_configs import PUBLISHED

from tinker_hpc.base_models import BaseModel
from tinker_hpc.config import ClusterProfile
from tinker_hpc.errors import ConfigError
from tinker_hpc.resources import Resources, build_job_spec, check_run_name, rank_memory_gib

SLURM = ClusterProfile("della", partition="gpu", memory="32G", time_limit_min=90)


def model() -> BaseModel:
    return BaseModel("m", Path("/m"), PUBLISHED["Qwen3-8B"], 8, 8, 8, "qwen3")


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
    ("name", "resources", "words"),
    [
        ("Qwen3-8B", Resources(gpus_per_node=4, tp_size=3), "tp_size is 3: it must divide the 4 ranks .* 1 or 2 or 4,"),
        ("Qwen3-8B", Resources(gpus_per_node=12, tp_size=12), "and divide its 8 .* Choose 1 or 2 or 4, or leave"),
        ("Qwen3-8B", Resources(gpus_per_node=6, tp_size=3, pp_size=2), "^tp_size is 3: .* the 32 heads .* 1 or 2, or"),
        ("Qwen3-8B", Resources(gpus_per_node=4, tp_size=2, pp_size=4), "^pp_size is 4, beside tp_size 2: .* 1 or 2,"),
        (
            "Qwen3-8B",
            Resources(gpus_per_node=4, pp_size=3),
            "^pp_size is 3: .* the 4 ranks, .* 36 layers .* 1 or 2 or 4,",
        ),
        ("Qwen3-8B", Resources(8, 8, pp_size=64), "^pp_size is 64: .* Choose 1 or 2 or 4 or 8 or 16 or 32, or"),
        ("Qwen3-8B", Resources(gpus_per_node=4, ep_size=2), "^ep_size is 2: Qwen3-8B has no experts .* Choose 1, or"),
        (
            "Qwen3-30B-A3B",
            Resources(gpus_per_node=8, pp_size=2, ep_size=8),
            "^ep_size is 8, beside pp_size 2: .* 128 experts .* Choose 1 or 2 or 4, or",
        ),
    ],
)
def test_sizes_that_do_not_go_together(name: str, resources: Resources, words: str) -> None:
    """The message names the size at fault, its rule, and the sizes that would do beside the others that were given."""
    with pytest.raises(ConfigError, match=words) as caught:
        spec(resources, base_model=published(name))
    assert "None" not in str(caught.value)


def test_a_pipeline_may_have_stages_of_unequal_size() -> None:
    job = spec(Resources(gpus_per_node=5, pp_size=5), base_model=published("Qwen3-8B"))
    assert job.layout.pp_size == 5, "of 36 layers"


@pytest.mark.parametrize("bad", [{"nodes": 0}, {"nodes": "2"}, {"gpus_per_node": -1}, {"tp_size": True}])
def test_sizes_are_checked(bad) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Resources(**bad)


def published(name: str) -> BaseModel:
    config = PUBLISHED[name]
    return BaseModel(name, Path("/m"), config, config["vocab_size"], 8, config["hidden_size"], config["model_type"])


@pytest.mark.parametrize(
    ("name", "gpus", "profile", "expected"),
    [
        ("Qwen3-8B", 4, ClusterProfile("c", gpu_memory_gib=80), (1, 4)),  # every GPU holds a copy
        ("Qwen3-8B", 4, ClusterProfile("c", gpu_type="nvidia_h100"), (1, 4)),
        ("Qwen3-8B", 4, ClusterProfile("c", gpu_type="a100", gpu_memory_gib=80), (1, 4)),
        ("Qwen3-8B", 4, ClusterProfile("c", gpu_type="a100"), (2, 2)),  # 40 GiB, the smaller of the two
        ("Qwen3-8B", 4, ClusterProfile("c"), (2, 2)),  # nothing known: assumed to be small
        ("Qwen3-32B", 8, ClusterProfile("c", gpu_memory_gib=80), (2, 4)),
        ("Llama-3.1-70B", 4, ClusterProfile("c", gpu_memory_gib=80), (4, 1)),
    ],
)
def test_the_layout_is_planned_into_the_gpus(name, gpus, profile, expected) -> None:
    job = spec(Resources(gpus_per_node=gpus), profile, published(name))
    assert (job.layout.tp_size, job.layout.dp_size) == expected
    assert 512 <= (job.layout.token_budget or 0) <= 8192
    assert job.from_json(job.to_json()) == job


def test_activations_that_do_not_fit_are_computed_again() -> None:
    made = [
        spec(Resources(gpus_per_node=1), ClusterProfile("c", gpu_memory_gib=memory), published("Qwen3-8B"))
        for memory in (24, 80)
    ]
    assert [job.layout.recompute for job in made] == [True, False]


def test_what_cannot_fit_is_refused_before_it_queues() -> None:
    small = ClusterProfile("c", gpu_memory_gib=24)
    with pytest.raises(
        ConfigError,
        match=r"Llama-3.1-70B does not fit 1 node.*It would fit with 8 such GPUs on a node, or on 4 such nodes",
    ):
        spec(Resources(gpus_per_node=2), small, published("Llama-3.1-70B"))
    by_hand = spec(Resources(gpus_per_node=2, tp_size=2), small, published("Llama-3.1-70B"))
    assert by_hand.layout.tp_size == 2, "who gives a size by hand gets it"
    assumed = spec(Resources(gpus_per_node=2), ClusterProfile("c"), published("Llama-3.1-70B"))
    assert assumed.layout.world_size == 2, "an assumption refuses nobody"


def test_a_refusal_says_where_the_size_of_a_gpu_is_from() -> None:
    with pytest.raises(
        ConfigError, match=r"of 40 GiB, taken from gpu_type 'a100' \(.*set gpu_memory_gib in \[clusters.c\]"
    ):
        spec(Resources(), ClusterProfile("c", gpu_type="a100"), published("Qwen3-32B"))
    with pytest.raises(ConfigError, match=r"GPU\(s\) of 40 GiB\. The weights"):
        spec(Resources(), ClusterProfile("c", gpu_type="a100", gpu_memory_gib=40), published("Qwen3-32B"))
    assert spec(Resources(), ClusterProfile("c", gpu_type="nvidia_a100_80gb_pcie"), published("Qwen3-32B"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "mistral"},
            r"/m/config\.json says model_type 'mistral', .*Supported: deepseek_v3, gpt_oss",
        ),
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next': .*gated delta nets.* Choose another"),
        ({"mlp_bias": True}, r"/m/config\.json: this llama model uses mlp_bias true, which is not implemented"),
        ({"hidden_act": "gelu", "attention_bias": True}, r"hidden_act 'gelu' \(only silu\); attention_bias true"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    ],
)
def test_what_the_worker_would_refuse_is_refused_before_it_queues(change, words) -> None:
    model = published("Llama-3.1-8B")
    with pytest.raises(ConfigError, match=words):
        spec(Resources(gpus_per_node=4), base_model=replace(model, config=model.config | change))


@pytest.mark.parametrize(
    ("profile", "gpus", "ranks", "memory", "expected"),
    [
        (ClusterProfile("c"), 1, 1, None, 40),
        (ClusterProfile("c", gpu_type="h200"), 1, 1, "8G", 141),
        (ClusterProfile("c", gpu_type="nvidia_a100-sxm4-80gb"), 1, 1, None, 80),
        (ClusterProfile("c", gpu_type="A100_80GB"), 1, 1, None, 80),
        (ClusterProfile("c", gpu_type="nvidia_a100_80gb_pcie"), 1, 1, None, 80),
        (ClusterProfile("c", gpu_type="tesla_v100-sxm2-32gb"), 1, 1, None, 32),
        (ClusterProfile("c", gpu_type="rtx_8000_48gb"), 1, 1, None, 48),
        (ClusterProfile("c", gpu_type="nvidia_gh200_480gb"), 1, 1, None, 96),  # of which 480 are the CPU's
        (ClusterProfile("c", gpu_type="nvidia_a100-sxm4-80gb", gpu_memory_gib=79), 1, 1, None, 79),
        (ClusterProfile("c", gpu_type="a100_1g.5gb"), 1, 1, None, 5),
        (ClusterProfile("c", gpu_type="nvidia_a100_3g.20gb"), 1, 1, None, 20),
        (ClusterProfile("c", gpu_type="nvidia_h100_80gb_hbm3_1g.10gb"), 1, 1, None, 10),
        (ClusterProfile("c", gpu_type="1g.12gb+me"), 1, 1, None, 12),
        (ClusterProfile("c", gpu_type="a100_3g.20gb", gpu_memory_gib=19), 1, 1, None, 19),
        (ClusterProfile("c"), 0, 2, "64G", 32),
        (ClusterProfile("c"), 0, 1, "2048", 2),
        (ClusterProfile("c"), 0, 1, None, math.inf),
    ],
)
def test_memory_of_a_rank(profile, gpus, ranks, memory, expected) -> None:
    assert rank_memory_gib(profile, gpus, ranks, memory) == expected


@pytest.mark.parametrize(
    "resources", [Resources(gpus_per_node=2), Resources(nodes=2), Resources(ranks_per_node=2), Resources(2, tp_size=1)]
)
def test_ranks_on_slices_of_a_gpu_are_refused(resources) -> None:
    sliced, small = ClusterProfile("mig", gpu_type="A100_3g.20gb"), published("Llama-3.2-1B")
    with pytest.raises(ConfigError, match=r"gpu_type is a slice of a GPU .*Ask for one node with one GPU"):
        spec(resources, sliced, small)
    assert spec(Resources(), sliced, small).layout.world_size == 1
    assert spec(Resources(2, 0), sliced, small).layout.world_size == 2, "without GPUs"
    with pytest.raises(ConfigError, match=r"does not fit .* 20 GiB.* take a larger slice, whole GPUs, or a smaller"):
        spec(Resources(), sliced, published("Qwen3-32B"))


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


@pytest.mark.parametrize("name", ["", "a b", "-x", "../x", "x" * 65, "ä", 3, Path("x")])
def test_names_that_cannot_be_folders(name) -> None:
    with pytest.raises(ConfigError, match="name is"):
        check_run_name(name, otherwise="run")
