"""The engine on CUDA and NCCL: float32 against transformers, bf16 against the same in float32, TP 2 against TP 1.

.venv/bin/python -m pytest tests/gpu -m gpu -n 6     # on a node with one GPU; the TP 2 tests want two

Each of the 82 tests starts its ranks anew, which is most of its time, on models so tiny that six such processes share a
GPU: one after the other they take longer than ten minutes. In parts: -k float32_equals, -k "trains or train_in",
-k routing, -k "mixed or recomputed", -k "sampled or cut_smaller".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "distributed"))

import parity_reference  # noqa: E402
from gloo_launcher import run_ranks  # noqa: E402
from jobs import Job  # noqa: E402
from parity_reference import Reference, sequences  # noqa: E402

from megatron_adapters.interface import Layout  # noqa: E402

COMMAND = ".venv/bin/python -m pytest tests/gpu -m gpu -n 6"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason=f"no CUDA device; on a GPU node run: {COMMAND}",
    ),
]


DENSE = ["llama", "qwen2", "qwen3"]
EXPERTS = ["qwen3_moe", "qwen3_moe_per_expert", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module", params=DENSE)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """transformers + peft in float32 on the CPU."""
    return parity_reference.build(request.param, tmp_path_factory.mktemp(request.param))


def run(reference: Reference, layout: Layout, dtype: str, folder: Path, scenario: str = "train") -> dict[str, Any]:
    if torch.cuda.device_count() < layout.world_size:
        pytest.skip(f"{layout.world_size} GPUs needed; on such a node run: {COMMAND}")
    arguments = (reference.model_folder, reference.adapter_folder, layout, dtype, folder)
    return run_ranks(f"cuda_scenarios:{scenario}", layout.world_size, folder, *arguments, modules=HERE)


def reference_logprobs(reference: Reference) -> list[np.ndarray]:
    return [
        logits.log_softmax(-1).gather(1, torch.from_numpy(sequence.targets)[:, None])[:, 0].numpy()
        for logits, sequence in zip(reference.logits, sequences(), strict=True)
    ]


@pytest.mark.parametrize("reference", [*DENSE, *EXPERTS], indirect=True)
@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1), Layout(2, 2)], ids=["tp1", "tp2", "tp2dp2"])
def test_float32_equals_transformers(reference: Reference, layout: Layout, tmp_path: Path) -> None:
    result = run(reference, layout, "float32", tmp_path)
    # Ten times the CPU tolerance: cuBLAS sums in another order.
    for ours, theirs in zip(result["logprobs"], reference_logprobs(reference), strict=True):
        assert np.abs(ours - theirs).max() < 2e-4
    for key, theirs in reference.grads.items():
        assert float((result["grads"][key] - theirs).abs().max() / theirs.abs().max()) < 2e-4, key


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1)], ids=["tp1", "tp2"])
def test_bfloat16_trains(reference: Reference, layout: Layout, tmp_path: Path) -> None:
    result = run(reference, layout, "bfloat16", tmp_path)
    # bf16 against float32 differs by 3 % of the logits' size on random weights (measured on the CPU).
    for ours, theirs in zip(result["logprobs"], reference_logprobs(reference), strict=True):
        assert np.abs(ours - theirs).mean() < 0.1
    assert result["losses"][-1] < 0.8 * result["losses"][0]
    assert result["same_after_loading"]


@pytest.mark.parametrize("reference", EXPERTS, indirect=True)
@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1, 1, 2)], ids=["tp1", "tp2ep2"])
def test_experts_train_in_bfloat16(reference: Reference, layout: Layout, tmp_path: Path) -> None:
    """By the grouped kernel. A rounding may choose another expert, which moves a few tokens by a lot: hence medians."""
    result = run(reference, layout, "bfloat16", tmp_path)
    gaps = [abs(a - b) for a, b in zip(result["logprobs"], reference_logprobs(reference), strict=True)]
    assert np.median(np.concatenate(gaps)) < 0.1
    assert result["losses"][-1] < 0.8 * result["losses"][0]
    assert result["same_after_loading"]


@pytest.mark.parametrize("reference", EXPERTS, indirect=True)
@pytest.mark.parametrize("layout", ["TP1", "TP2+EP2", "PP2"])
def test_routing_is_replayed(reference: Reference, layout: str, tmp_path: Path) -> None:
    """The trainer takes the sampler's experts; the CPU form, beside transformers, is in tests/distributed."""
    job = Job(layout, "routing_scenarios:both", reference.family)
    if torch.cuda.device_count() < job.num_ranks:
        pytest.skip(f"{job.num_ranks} GPUs needed; on such a node run: {COMMAND}")
    references = {reference.family: reference}
    found = run_ranks("jobs:run_jobs", job.num_ranks, tmp_path, [job], references, tmp_path, {})[job]
    for dtype in ("float32", "bfloat16"):
        for recorded, replayed in zip(found[dtype]["recorded"], found[dtype]["replayed"], strict=True):
            assert np.array_equal(replayed, recorded)
    gaps = [
        np.abs(np.concatenate(found["bfloat16"][f"{how} logprobs"]) - np.concatenate(found["bfloat16"]["sampled"]))
        for how in ("replayed", "own")
    ]
    assert gaps[0].mean() <= 1.1 * gaps[1].mean()  # few choices differ where scores are float32 (DeepSeek-V3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1)], ids=["tp1", "tp2"])
def test_adapters_mixed_equal_each_alone(reference: Reference, layout: Layout, dtype: str, tmp_path: Path) -> None:
    """In bf16 on one GPU by grouped products; the CPU form is tests/unit/megatron_adapters/test_lora_grouped.py."""
    bounds = {"float32": 2e-4, "bfloat16": 0.1}  # bf16: other sums round to the neighbouring number
    for found in run(reference, layout, dtype, tmp_path, "mixed").values():
        alone, together = found["alone"], found["together"]
        assert np.abs(together["logprobs"] - alone["logprobs"]).mean() < bounds[dtype]
        assert float((together["grads"] - alone["grads"]).norm() / alone["grads"].norm()) < bounds[dtype]


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1)], ids=["tp1", "tp2"])
def test_recomputed_activations_give_the_same_gradients(reference: Reference, layout: Layout, tmp_path: Path) -> None:
    result = run(reference, layout, "float32", tmp_path, "recompute")
    kept, again = result["kept"], result["again"]
    assert all(np.array_equal(a, b) for a, b in zip(kept["logprobs"], again["logprobs"], strict=True))
    for key, x in kept["grads"].items():  # attention's backward may add in another order from run to run
        assert float((again["grads"][key] - x).abs().max() / x.abs().max()) < 1e-5, key


@pytest.mark.parametrize("reference", [*DENSE, *EXPERTS], indirect=True)
@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 1)], ids=["tp1", "tp2"])
def test_sampled_logprobs_are_the_trainers(reference: Reference, layout: Layout, tmp_path: Path) -> None:
    result = run(reference, layout, "float32", tmp_path, "sample")
    assert not any(result["errors"])
    assert len(result["gaps"]) == 8
    assert max(gap.max() for gap in result["gaps"]) < 2e-4  # as above


def test_a_pass_that_does_not_fit_is_cut_smaller(reference: Reference, tmp_path: Path) -> None:
    """The want of memory is the allocator's own limit; the CPU form, through a worker, is in tests/distributed."""
    result = run_ranks("cuda_scenarios:out_of_memory", 1, tmp_path, reference.model_folder, modules=HERE)
    assert result["errors"] and set(result["errors"]) == {"OutOfMemoryError"}
    assert result["budget"] <= 24 * 256 // 2
    assert result["logprobs"] < 1e-5
    assert result["norms"][1] == pytest.approx(result["norms"][0], rel=1e-6)
