"""The gap between sampler and trainer: which tokens count, and what is said of them."""

from __future__ import annotations

import numpy as np

from megatron_adapters.interface import Datum
from tinker_hpc.worker.metrics import StepMetrics
from tinker_hpc.worker.sampler_gap import SamplerGap, sampler_gap


def datum(sampled: list[float], advantages: list[float] | None) -> Datum:
    inputs = {"target_tokens": np.zeros(len(sampled), np.int64), "sampling_logprobs": np.array(sampled, np.float32)}
    if advantages is not None:
        inputs["advantages"] = np.array(advantages, np.float32)
    return Datum(np.zeros(len(sampled), np.int32), inputs)


def test_tokens_with_advantage_count():
    data = [datum([0, 0, -1, -2], [0, 0, 1, -1]), datum([-1, -1], [0, 0]), datum([-4], None)]
    trained = [np.array([-9, -9, -1.5, -2.25]), np.array([-7, -7]), np.array([-3.0])]
    gap = sampler_gap(data, trained)
    assert gap == SamplerGap(0.5 + 0.25 + 1.0, 1.0, 3)
    assert gap.metrics() == {"sampler_gap:mean": 1.75 / 3, "sampler_gap:max": 1.0}


def test_losses_without_sampled_logprobs_have_none():
    plain = Datum(np.zeros(2, np.int32), {"target_tokens": np.zeros(2, np.int64), "weights": np.ones(2, np.float32)})
    assert sampler_gap([plain], [np.zeros(2)]).metrics() == {}


def test_the_line_of_a_step_holds_all_its_passes():
    metrics = StepMetrics()
    for gap in (SamplerGap(1.0, 0.75, 2), SamplerGap(0.5, 0.5, 1), SamplerGap()):
        metrics.add(loss_sum=1.0, num_loss_tokens=2, num_tokens=3, seconds=0.1, gap=gap)
    line = metrics.line("m", 1, {}, 1e-4, 0.1, seq=3)
    assert (line["sampler_gap_mean"], line["sampler_gap_max"]) == (0.5, 0.75)
    assert StepMetrics().line("m", 1, {}, 1e-4, 0.1, seq=3)["sampler_gap_mean"] is None
