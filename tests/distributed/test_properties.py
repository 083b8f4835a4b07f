"""Promises about training, under every layout: what must be equal, and whether bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job
from parity_reference import Reference
from torch import Tensor

pytestmark = pytest.mark.distributed

JOBS = {
    layout: Job(layout, "property_scenarios:run_all", "qwen3", also=("qwen2",)) for layout in ("TP1", "TP2", "TP2×DP2")
}
RESUMED = [
    Job(layout, "property_scenarios:resume", "qwen3", given=JOBS[saved])
    for saved, layout in (("TP2", "TP1"), ("TP1", "TP2×DP2"))
]


@pytest.fixture(params=JOBS.values(), ids=JOBS)
def properties(request: pytest.FixtureRequest, outcome_of: Callable[[Job], Any]) -> dict[str, Any]:
    return outcome_of(request.param)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for key, matrix in a.items():
        assert torch.equal(matrix, b[key]), key


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def relative_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max()) for key in a)


def test_b_zero_leaves_the_base_bit_identical(properties: dict[str, Any]) -> None:
    result = properties["fresh_adapter_is_the_base"]
    for base, with_adapter in zip(result["base"], result["with_adapter"], strict=True):
        assert torch.equal(base, with_adapter)


def test_initial_weights_are_pefts_distribution(properties: dict[str, Any]) -> None:
    for key, matrix in properties["fresh_adapter_is_the_base"]["weights"].items():
        if "lora_B" in key:
            assert not matrix.any()
        else:
            bound = matrix.shape[1] ** -0.5
            assert bound * 0.9 < matrix.abs().max() <= bound
            assert matrix.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_initial_weights_do_not_depend_on_the_layout(
    properties: dict[str, Any], outcome_of: Callable[[Job], Any]
) -> None:
    single = outcome_of(JOBS["TP1"])
    assert_same_bits(*(x["fresh_adapter_is_the_base"]["weights"] for x in (single, properties)))


def test_two_passes_equal_one_joined(properties: dict[str, Any]) -> None:
    result = properties["two_passes_equal_one"]
    # Float32 sums in another order: 1e-5 of each matrix's largest entry.
    assert relative_gap(result["split"], result["joined"]) < 1e-5


def test_several_targets_a_token_are_transformers_numbers(
    properties: dict[str, Any], references: dict[str, Reference]
) -> None:
    """Logprobs of three targets a token; the gradient is that of three passes of one target each."""
    result = properties["several_targets"]
    for ours, targets, logits in zip(result["logprobs"], result["targets"], references["qwen3"].logits, strict=True):
        theirs = logits.double().log_softmax(-1).gather(1, torch.from_numpy(targets))
        assert ours.shape == targets.shape and ours.dtype == np.float32
        assert np.abs(ours - theirs.numpy()).max() <= 2e-5
    assert result["loss"] == pytest.approx(result["loss_alone"], rel=1e-5)
    assert relative_gap(result["soft"], result["one_by_one"]) < 1e-5


def test_an_uploaded_loss_is_cut_like_any_other(properties: dict[str, Any]) -> None:
    result = properties["uploaded_loss"]
    uploaded, by_hand = result["uploaded"], result["by_hand"]
    assert uploaded["loss"] == pytest.approx(by_hand["loss"], rel=1e-5)
    assert relative_gap(uploaded["grads"], by_hand["grads"]) < 1e-5
    assert result["metrics"]["custom/p:mean"] == pytest.approx(result["expected_p"], rel=1e-5)


def test_zero_weight_data_is_a_no_op_bit_for_bit(properties: dict[str, Any]) -> None:
    result = properties["zero_weight_is_no_op"]
    assert_same_bits(result["plain"], result["with_zeros"])


def test_results_come_in_the_order_given(properties: dict[str, Any]) -> None:
    result = properties["order_is_kept"]
    for together, alone in zip(result["together"], result["alone"], strict=True):
        assert together.shape == alone.shape
        assert np.abs(together - alone).max() < 1e-5
    assert result["loss"] == pytest.approx(result["loss_alone"], rel=1e-6)


def test_forward_alone_leaves_no_gradient(properties: dict[str, Any]) -> None:
    assert properties["order_is_kept"]["grad"] == 0.0


def test_save_load_step_equals_step_bit_for_bit(properties: dict[str, Any]) -> None:
    result = properties["save_load_step"]
    assert result["steps"] == 3
    assert_same_bits(result["kept"], result["loaded"])


@pytest.mark.parametrize("job", RESUMED, ids=str)
def test_a_state_resumes_under_another_layout(job: Job, outcome_of: Callable[[Job], Any]) -> None:
    assert job.given is not None
    gap = largest_gap(outcome_of(job.given)["save_load_step"]["kept"], outcome_of(job))
    print(f"\nPARITY state saved under {job.given.layout}, step under {job.layout}: max abs {gap:.1e}")
    assert gap < 1e-6


def test_training_one_adapter_leaves_the_other_alone(properties: dict[str, Any]) -> None:
    result = properties["adapters_are_separate"]
    assert_same_bits(result["before"], result["after"])
    assert_same_bits(result["grads_before"], result["grads_after"])
    assert any(x.any() for x in result["grads_before"].values())


def test_an_adapter_trains_the_same_alone_and_beside_another(properties: dict[str, Any]) -> None:
    result = properties["adapters_are_separate"]
    assert_same_bits(result["alone"], result["beside"])


def test_adapters_mix_in_one_forward(properties: dict[str, Any]) -> None:
    result = properties["mixed_batch"]
    for mixed, separate, snapshot in zip(result["mixed"], result["separate"], result["with_snapshot"], strict=True):
        assert (mixed - separate).abs().max() < 1e-5
        assert torch.equal(mixed, snapshot)  # a snapshot computes what the adapter computes
    base = properties["fresh_adapter_is_the_base"]["base"]
    apart = [(a - b).abs().max() for a, b in zip(result["mixed"], base, strict=True)]
    assert apart[1] < 1e-5 < min(apart[0], apart[2], apart[3])  # the second sequence runs on the bare base


def test_a_failed_pass_adds_nothing(properties: dict[str, Any]) -> None:
    result = properties["failed_pass_adds_nothing"]
    assert result["raised"] == ["KeyError", "RequestError"] * 2
    assert result["unchanged"] == [True] * 4


EXPECTED_COMPLAINTS = {
    "rank 0": "RequestError: LoRA rank 0",
    "nothing trained": "RequestError: train_attn, train_mlp and train_unembed are all false",
    "taken id": "RequestError: an adapter 'ok' exists already",
    "unknown adapter": "RequestError: no adapter 'nobody'. Known: ",
    "unknown snapshot": "RequestError: no snapshot 'nobody'",
    "no data": "RequestError: a pass needs at least one datum",
    "no tokens": "RequestError: datum 0 has no tokens",
    "no targets": "RequestError: the loss inputs ['weights'] lack target_tokens",
    "keys differ": "RequestError: datum 1 has the loss inputs ['target_tokens'], datum 0 has",
    "short weights": "ShapeError: datum 0: weights has shape [3], the datum has 17 tokens",
    "targets that differ in number": "ShapeError: datum 1: target_tokens has shape [17, 2], that of datum 0 is [17]",
    "token beyond vocabulary": "RequestError: datum 0: tokens holds the id ",
    "negative target": "RequestError: datum 0: target_tokens holds the id -",
    "over the context": "RequestError: datum 0 has 513 tokens, the model's context is 512",
    "nan weights": "RequestError: the loss of this pass is nan",
    "nan gradient": "RequestError: the gradient norm of adapter 'ok' is nan",
    "missing folder": "WeightsError: cannot read ",
    "no optimizer state": "WeightsError: cannot read ",
    "another model's adapter": "WeightsError: the tensors in ",
    "folder is a file": "NotADirectoryError: ",
    "layout does not fit": "ConfigError: tp_size 3 does not divide num_attention_heads (4), num_key_value_heads (2)",
}


@pytest.mark.parametrize("request_name", list(EXPECTED_COMPLAINTS))
def test_bad_requests_are_refused_with_a_remedy(properties: dict[str, Any], request_name: str) -> None:
    message = properties["bad_requests"][request_name]
    assert message.startswith(EXPECTED_COMPLAINTS[request_name]), message


def test_the_engine_stays_usable_after_bad_requests(properties: dict[str, Any]) -> None:
    assert np.isfinite(float(properties["bad_requests"]["afterwards"]))
