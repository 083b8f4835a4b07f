"""The planner's arithmetic and the oracle against real things: models built on the meta device, measured processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_models
from jobs import Job
from parity_reference import RANK as LORA_RANK
from parity_reference import Reference
from published_configs import PUBLISHED

from launch.memory_model import GIB, activation_bytes_per_token, heap_factor, memory
from launch.memory_model import Job as PlannedJob
from launch.model_sizes import Split, read_sizes
from launch.plan import Machine, make_plan

HERE = Path(__file__).parent
RANK = 32
WHOLE = {"tp_size": 1, "dp_size": 1, "pp_size": 1, "ep_size": 1}
# Trainable parameters per unit of rank as Tinker's cookbook publishes them (hyperparam_utils.py): MLP, attention,
# unembedding.
ORACLE = {
    "Llama-3.2-1B": (491_520, 212_992, 130_304),
    "Llama-3.1-8B": (1_769_472, 851_968, 132_352),
    "Llama-3.1-70B": (8_847_360, 4_096_000, 136_448),
    "Qwen3-8B": (1_769_472, 958_464, 156_032),
    "Qwen3-32B": (5_898_240, 2_490_368, 157_056),
    "Qwen3-30B-A3B": (14_450_688, 835_584, 153_984),
    "Qwen3-235B-A22B": (56_598_528, 3_176_448, 156_032),
}
PLANNED = [
    ("Qwen3-30B-A3B", Machine(1, 1, 141)),
    ("Qwen3-235B-A22B", Machine(2, 8, 80)),
    ("Qwen3-235B-A22B", Machine(4, 8, 80)),
    ("Qwen3-235B-A22B", Machine(2, 8, 40)),  # TP 8 on 4 key-value heads
    ("Llama-3.1-70B", Machine(2, 4, 40)),  # two stages
    ("Llama-3.1-70B", Machine(1, 4, 80)),
    ("DeepSeek-V3", Machine(4, 8, 80)),
    ("Moonlight-16B-A3B", Machine(1, 2, 80)),
    ("gpt-oss-20b", Machine(1, 1, 80)),
    ("gpt-oss-120b", Machine(1, 8, 80)),
    ("Qwen3-8B", Machine(1, 1, 80)),
    ("Qwen3-32B", Machine(2, 8, 80)),
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, int]], dict[str, Any]]:
    """built(name, layout): what meta_model.py counted; all of it in one process, once."""
    wanted = [[name, WHOLE, RANK] for name in ORACLE]
    wanted += [[name, layout_of(name, machine), RANK] for name, machine in PLANNED]
    file = tmp_path_factory.mktemp("meta") / "requests.json"
    file.write_text(json.dumps(wanted))
    counted = json.loads(output_of("meta_model.py", str(file)))

    def find(name: str, layout: dict[str, int]) -> dict[str, Any]:
        return counted[wanted.index([name, layout, RANK])]

    return find


def layout_of(name: str, machine: Machine) -> dict[str, int]:
    plan = make_plan(read_sizes(PUBLISHED[name]), machine, lora_rank=RANK)
    assert plan is not None
    return {"tp_size": plan.tp_size, "dp_size": plan.dp_size, "pp_size": plan.pp_size, "ep_size": plan.ep_size}


def output_of(script: str, *arguments: str, **environment: str) -> str:
    """The last line that a script of this folder prints."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", list(ORACLE))
def test_parameter_oracle(name: str, built) -> None:
    """Our own model and adapter code, at full size: trainable parameters to the digit, for rank 32, by part."""
    mlp, attention, unembed = ORACLE[name]
    expected = {"mlp": RANK * mlp, "attention": RANK * attention, "unembed": RANK * unembed}
    assert built(name, WHOLE)["trained"] == expected


@pytest.mark.parametrize(
    ("name", "machine"),
    PLANNED,
    ids=[f"{name} on {m.nodes} x {m.ranks_per_node} x {m.memory_gib}" for name, m in PLANNED],
)
def test_planned_bytes_are_the_built_ones(name: str, machine: Machine, built) -> None:
    plan = make_plan(read_sizes(PUBLISHED[name]), machine, lora_rank=RANK)
    assert plan is not None and plan.fits
    real = built(name, layout_of(name, machine))
    gib = {part: (getattr(plan.memory, part) / GIB, real[part] / GIB) for part in ("weights", "adapters")}
    layout = f"TP {plan.tp_size} DP {plan.dp_size} PP {plan.pp_size} EP {plan.ep_size}"
    print(f"{name} on {machine.nodes} x {machine.ranks_per_node}, {layout}, planned and built GiB a rank: {gib}")
    assert plan.memory.weights == pytest.approx(real["weights"], rel=0.001)
    # Rank 0 is in the first stage; a plan counts the fullest, which is the last: it has the unembedding's.
    assert plan.memory.adapters == pytest.approx(real["adapters"], rel=0.001 if plan.pp_size == 1 else 0.015)
    assert plan.memory.cache == plan.cache_tokens * real["cached_token"]
    assert plan.memory.total < machine.memory_gib * GIB


KEPT = [
    Job("TP1", "layout_scenarios:kept_bytes", family) for family in ("qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3")
]


@pytest.mark.parametrize("job", KEPT, ids=str)
def test_activations_are_what_autograd_keeps(
    job: Job, outcome_of: Callable[[Job], dict[str, float]], references: dict[str, Reference]
) -> None:
    """Of sequences of unequal lengths. Seen: 1 % to 10 % more is counted than kept."""
    sizes = read_sizes(json.loads((references[job.family].model_folder / "config.json").read_text()))
    for dtype, kept in outcome_of(job).items():
        planned = PlannedJob(4 if dtype == "float32" else 2, on_gpu=False, lora_rank=LORA_RANK)
        counted = activation_bytes_per_token(sizes, Split(), planned) / heap_factor(planned)
        print(f"{job} {dtype}: {counted:.0f} bytes a token counted, {kept:.0f} kept")
        assert 0.95 * kept <= counted <= 1.15 * kept


SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
QWEN3 = SIZES | {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "head_dim": 64,
}
LLAMA = SIZES | {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields", "num_sequences", "recompute"),
    [("qwen3", QWEN3, 6, False), ("llama", LLAMA, 4, False), ("qwen3", QWEN3, 16, True)],
)
def test_estimate_is_the_measured_peak(
    family: str, fields: dict[str, Any], num_sequences: int, recompute: bool, tmp_path: Path
) -> None:
    """A CPU-sized model's training step: estimated bytes against the kernel's high-water mark."""
    folder, length = random_models.make(family, tmp_path, **fields), 256
    arguments = (str(folder), str(RANK), str(num_sequences), str(length), "recompute" if recompute else "")
    sizes = read_sizes(json.loads((folder / "config.json").read_text()))
    job = PlannedJob(4, on_gpu=False, lora_rank=RANK, recompute=recompute)
    estimate = memory(sizes, Split(), job, num_sequences * length, alone=True)
    measured = json.loads(output_of("peak_memory.py", *arguments))
    print(f"{family}: estimated {estimate.total / GIB:.3f} GiB, measured {measured['peak'] / GIB:.3f} GiB")
    assert estimate.total == pytest.approx(measured["peak"], rel=0.15)
