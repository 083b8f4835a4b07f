"""The other benchmarks still run and write complete records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.distributed


def quick(script: str, folder: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / script), "--quick", "--results", str(folder), *more]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.json")
    return json.loads(path.read_text())


def test_many_adapters(tmp_path: Path) -> None:
    metrics = quick("bench_many_adapters.py", tmp_path)["metrics"]
    assert set(metrics) == {"training step, eight adapters", "sampling, eight adapters"}
    for metric in metrics.values():
        rates = metric["tokens_per_s"]
        assert {"mixed", "one", "one by one", "ratio_mixed_to_one", "ratio_mixed_to_one by one"} == set(rates)
        assert all(row["median"] > 0 for row in rates.values())


def test_load_and_memory(tmp_path: Path) -> None:
    metrics = quick("bench_load_and_memory.py", tmp_path)["metrics"]["one process"]
    for metric in ("load_s", "peak_memory_gib"):
        assert metrics[metric]["tinker_hpc"]["median"] > 0 < metrics[metric]["transformers_peft"]["median"]


def test_sampler_gap(tmp_path: Path) -> None:
    metrics = quick("bench_sampler_gap.py", tmp_path)["metrics"]
    for dtype, bound in {"float32": 1e-4, "bfloat16": 0.5}.items():
        assert 0 <= metrics[dtype]["mean_nats"]["tinker_hpc"]["median"] < bound


@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-30B-A3B"])
def test_gpu_shapes_made_tiny(model: str, tmp_path: Path) -> None:
    record = quick("bench_gpu.py", tmp_path, "--model", model)
    assert 3.9 < record["config"]["flops_per_trained_token"] / record["config"]["num_active_parameters"] < 4
    ratios = {
        "training": "tinker_hpc_to_transformers_peft",
        "sampling": "tinker_hpc_to_transformers_peft",
        "mixed": "mixed_to_one",
    }
    assert set(record["metrics"]) == set(ratios)
    for case, ratio in ratios.items():
        assert record["metrics"][case]["tokens_per_s"][f"ratio_{ratio}"]["median"] > 0


SHORT_OF_MEMORY = """
import gc, sys, torch, bench_gpu
def after_ours(side, *arguments):
    assert not [x for x in gc.get_objects() if type(x).__name__ == "TransformerLayer"], "the first side is still there"
    init(side, *arguments)
def sample(side, prompts, new_tokens):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
init, bench_gpu.Theirs.__init__ = bench_gpu.Theirs.__init__, after_ours
bench_gpu.Theirs.sample = sample
bench_gpu.main(sys.argv[1:])
"""


def test_a_side_that_runs_out_of_memory_leaves_the_others_numbers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHORT_OF_MEMORY, "--quick", "--model", "Qwen3-30B-A3B", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers_peft ran out of memory" in done.stdout
    [path] = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert list(record["config"]["out_of_memory"]) == ["transformers_peft"]
    metrics = record["metrics"]
    assert "transformers_peft" in metrics["training"]["tokens_per_s"]
    assert list(metrics["sampling"]["tokens_per_s"]) == ["tinker_hpc"]


def test_custom_loss(tmp_path: Path) -> None:
    [metrics] = quick("bench_custom_loss.py", tmp_path)["metrics"].values()
    sides = metrics["pass_ms"]
    assert {"on_the_server", "beside_the_loop", "published_ppo"} < set(sides)
    assert all(row["median"] > 0 for row in sides.values())


def test_fault_tolerance_cost(tmp_path: Path) -> None:
    metrics = quick("bench_fault_tolerance_cost.py", tmp_path)["metrics"]
    assert metrics["logging"]["step_time_ms"]["ratio_on_to_off"]["median"] > 0
    assert metrics["in all"]["step_time_ratio"]["on_to_off"]["median"] > 0
    assert metrics["recovery, at most"]["redone_s"]["ratio_redone_to_interval"]["median"] > 0
    assert metrics["replay of 3 steps"]["loop_s"]["replayed"]["median"] > 0
