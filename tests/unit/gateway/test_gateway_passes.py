"""passes.py: a right forward_backward is flattened; in a wrong one the mistake is named, with what to change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import custom_losses
import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tinker_hpc.base_models import BaseModel
from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import passes, wire
from tinker_hpc.gateway.custom_losses import CustomLosses, answer_of_creation, creation_id
from tinker_hpc.gateway.wire import ForwardBackwardCall, WireDatum, WireTensor
from tinker_hpc.loss_table import KNOWN_LOSSES

BASE = BaseModel(
    name="org/tiny",
    folder=Path("/models/tiny"),
    config={},
    vocab_size=100,
    max_context=16,
    hidden_size=48,
    model_type="qwen3",
)


def tensor(values: Any, dtype: str = "float32", shape: tuple[int, ...] | None = None) -> WireTensor:
    array = np.asarray(values, dtype=dtype)
    return WireTensor(array.reshape(-1), shape or array.shape)


def sparse(
    values: list[int], rows: list[int], columns: list[int], shape: tuple[int, ...], dtype: str = "int64"
) -> WireTensor:
    return WireTensor(np.array(values, dtype), shape, np.array(rows, np.int64), np.array(columns, np.int64))


def call(*data: WireDatum, loss: str = "cross_entropy", config: Any = None) -> ForwardBackwardCall:
    return ForwardBackwardCall("m", 1, data, loss, config or {}, False)


def custom(loss_id: str, *data: WireDatum) -> ForwardBackwardCall:
    return call(*(data or [good()]), loss="custom", config={"loss_id": loss_id})


def judge(
    asked: ForwardBackwardCall, folder: Path = Path("/nowhere"), stable_reinforce: str | None = None
) -> passes.Judged:
    return passes.forward_backward(asked, BASE, passes.Losses(CustomLosses(folder), stable_reinforce))


def good(n: int = 4, **changed: WireTensor) -> WireDatum:
    inputs = {"target_tokens": tensor(range(n), "int64"), "weights": tensor([1.0] * n), **changed}
    return WireDatum(np.arange(n, dtype=np.int32), inputs)


def sampled(n: int = 4, **changed: WireTensor) -> WireDatum:
    inputs = {
        "target_tokens": tensor(range(n), "int64"),
        "logprobs": tensor([-1.0] * n),
        "advantages": tensor([1.0] * n),
        **changed,
    }
    return WireDatum(np.arange(n, dtype=np.int32), inputs)


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=16), min_size=1, max_size=6))
def test_a_good_call_is_flattened_in_order(rows):
    data = [
        WireDatum(
            np.array(row, np.int32),
            {"weights": tensor([0.5] * len(row)), "target_tokens": tensor(row[::-1], "int64")},
        )
        for row in rows
    ]
    header, arrays = judge(call(*data))
    assert header["input_keys"] == ["target_tokens", "weights"]
    assert header["trailing_shapes"] == {"target_tokens": [], "weights": []}
    assert arrays["tokens"].dtype == np.int32
    assert arrays["input.target_tokens"].dtype == np.int64
    assert arrays["input.weights"].dtype == np.float32
    for index, row in enumerate(rows):
        start, end = arrays["offsets"][index : index + 2]
        assert arrays["tokens"][start:end].tolist() == row
        assert arrays["input.target_tokens"][start:end].tolist() == row[::-1]


def test_integer_weights_are_numbers_too():
    _, arrays = judge(call(good(weights=tensor([1, 0, 1, 1], "int64"))))
    assert arrays["input.weights"].tolist() == [1.0, 0.0, 1.0, 1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.floats(0.0, 1.0))
def test_several_targets_arrive_as_the_sdk_wrote_them_sparse_or_dense(seed, num_targets, share):
    """Torch tensors are sent as CSR by the SDK where that is smaller; either way the log has all K of each token."""
    rng = np.random.default_rng(seed)
    written = []
    for n in (3, 5):
        shown = rng.random((n, num_targets)) < share
        targets = np.where(shown, rng.integers(1, 100, (n, num_targets)), 0)
        weights = np.where(shown, rng.normal(size=(n, num_targets)), 0).astype(np.float32)
        written.append((targets, weights))
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(list(range(len(targets)))),
            loss_fn_inputs={"target_tokens": torch.tensor(targets), "weights": torch.tensor(weights)},
        )
        for targets, weights in written
    ]
    request = ForwardBackwardRequest(
        forward_backward_input=tinker.types.ForwardBackwardInput(data=data, loss_fn="cross_entropy"),
        model_id="m",
        seq_id=1,
    )
    decoded = wire.decode_forward_backward(forward_backward_request_to_proto(request).SerializeToString())
    header, arrays = judge(decoded)
    assert header["trailing_shapes"] == {"target_tokens": [num_targets], "weights": [num_targets]}
    np.testing.assert_array_equal(
        arrays["input.target_tokens"], np.concatenate([targets.reshape(-1) for targets, _ in written])
    )
    np.testing.assert_array_equal(arrays["input.weights"], np.concatenate([w.reshape(-1) for _, w in written]))
    assert arrays["offsets"].tolist() == [0, 3, 8]


def two_targets(**changed: WireTensor) -> WireDatum:
    pairs = {"target_tokens": tensor([[1, 2]] * 4, "int64"), "weights": tensor([[0.5, 0.5]] * 4)}
    return good(4, **{**pairs, **changed})


def crooked(**parts: Any) -> WireTensor:
    whole = {"values": [7, 8], "rows": [0, 1, 2, 2, 2], "columns": [0, 2], "shape": (4, 3)}
    return sparse(**{**whole, **parts})


WRONG_CALLS = {
    "no data": (call(), "no data; give at least one Datum"),
    "empty sequence": (call(good(), WireDatum(np.array([], np.int32), {})), "data[1].model_input is empty"),
    "over the context": (call(good(17)), "17 tokens, more than the context of org/tiny, 16"),
    "an image": (call(WireDatum(np.array([1], np.int32), {}, ("image",))), "reads text only"),
    "missing input": (
        call(WireDatum(np.arange(4, dtype=np.int32), {"target_tokens": tensor(range(4), "int64")})),
        "data[0].loss_fn_inputs lacks weights: loss_fn 'cross_entropy' needs target_tokens, weights, each of shape [4]",
    ),
    "input of another loss": (call(good(advantages=tensor([1.0] * 4))), "has 'advantages', which loss_fn"),
    "keys that differ": (
        call(sampled(), sampled(clip_low_threshold=tensor([0.5] * 4)), loss="ppo"),
        "all datums of one call need the same keys",
    ),
    "shape": (call(good(weights=tensor([1.0] * 3))), "['weights'] has shape [3], expected [4], the shape of"),
    "short targets": (call(good(target_tokens=tensor([1] * 3, "int64"))), "has shape [3] beside a model_input of 4"),
    "no targets": (call(good(target_tokens=tensor([], "int64", (4, 0)))), "has shape [4, 0] beside a model_input of 4"),
    "three dimensions": (call(good(target_tokens=tensor([1] * 8, "int64", (4, 2, 1)))), "or [4, K] for K targets"),
    "one weight for two targets": (call(two_targets(weights=tensor([1.0] * 4))), "has shape [4], expected [4, 2]"),
    "another number of targets": (
        call(two_targets(), good()),
        "data[1].loss_fn_inputs['target_tokens'] has shape [4], that of data[0] is [4, 2]",
    ),
    "two targets for ppo": (
        call(sampled(target_tokens=tensor([[1, 2]] * 4, "int64")), loss="ppo"),
        "loss_fn 'ppo' takes one target per position, shape [4]. Several targets [N, K] are for: cross_entropy",
    ),
    "many targets in few bytes": (
        call(good(target_tokens=sparse([], [0] * 5, [], (4, 2**40)), weights=sparse([], [0] * 5, [], (4, 2**40)))),
        f"at most {passes.MAX_TARGETS} are taken",
    ),
    "sparse rows": (call(two_targets(target_tokens=crooked(rows=[0, 1, 2, 2]))), "expected 5 row pointers that rise"),
    "sparse rows that fall": (call(two_targets(target_tokens=crooked(rows=[0, 2, 1, 2, 2]))), "row pointers that rise"),
    "sparse columns": (call(two_targets(target_tokens=crooked(columns=[0, 3]))), "a column outside of 0 to 2"),
    "sparse columns that fall": (
        call(two_targets(target_tokens=crooked(rows=[0, 2, 2, 2, 2], columns=[1, 1]))),
        "a row's columns do not rise",
    ),
    "sparse with one dimension": (
        call(good(target_tokens=sparse([1], [0, 1], [0], (4,)))),
        "sparse tensors have two dimensions",
    ),
    "shape that lies": (call(good(weights=tensor([1.0] * 3, shape=(4,)))), "has shape [4] but 3 values; expected 4"),
    "float targets": (call(good(target_tokens=tensor(range(4)))), "is float32, expected int64 token ids"),
    "nan": (call(good(), good(weights=tensor([1, math.nan, 1, 1]))), "data[1].loss_fn_inputs['weights'][1] is nan"),
    "nan among two": (
        call(two_targets(), two_targets(weights=tensor([[1, 1], [1, math.nan], [1, 1], [1, 1]]))),
        "data[1].loss_fn_inputs['weights'][1][1] is nan",
    ),
    "infinity": (call(good(weights=tensor([1, 1, 1, -math.inf]))), "data[0].loss_fn_inputs['weights'][3] is -inf"),
    "beyond the vocabulary": (
        call(good(), WireDatum(np.array([1, 100], np.int32), dict(good(2).inputs))),
        "data[1].model_input[1] is token id 100; org/tiny has ids 0 to 99",
    ),
    "negative target": (call(good(target_tokens=tensor([1, 2, -100, 4], "int64"))), "set its weight to 0"),
    "int64 target": (call(good(target_tokens=tensor([1, 2, 2**40, 4], "int64"))), "is token id 1099511627776"),
    "second target": (
        call(two_targets(target_tokens=tensor([[1, 2], [1, 2], [1, 2], [1, 100]], "int64"))),
        "data[0].loss_fn_inputs['target_tokens'][3][1] is token id 100",
    ),
    "unknown loss": (call(good(), loss="crossentropy"), "unknown loss_fn 'crossentropy'. Tinker's losses are"),
    "stable_reinforce": (call(good(), loss="stable_reinforce"), "loss_fn='importance_sampling'"),
    "uploaded loss without its id": (call(good(), loss="custom"), "takes loss_fn_config {'loss_id': ...}, given: []"),
    "uploaded loss nobody knows": (custom("loss-" + "0" * 32), "unknown custom loss 'loss-0000"),
    "uploaded loss that is a path": (custom("../../gateway"), "unknown custom loss '../../gateway'"),
    "config key": (call(good(), config={"beta": 1.0}), "loss_fn_config has 'beta'"),
    "crossed bounds": (
        call(sampled(), loss="ppo", config={"clip_low_threshold": 2.0}),
        "clip_low_threshold is 2 and clip_high_threshold 1.2: bounds of the ratio",
    ),
    "crossed bounds of a token": (
        call(sampled(), sampled(clip_low_threshold=tensor([0, 0, 3, 0])), loss="cispo"),
        "all datums of one call",
    ),
    "an input's bound above the config's": (
        call(sampled(3, clip_low_threshold=tensor([0, 0, 5])), loss="cispo"),
        "clip_low_threshold is 5 and clip_high_threshold 4 (data[0][2])",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_are_named(name):
    wrong, words = WRONG_CALLS[name]
    with pytest.raises(RequestError) as caught:
        judge(wrong)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(KNOWN_LOSSES) - {"cross_entropy"}))
def test_every_policy_loss_is_taken_with_its_defaults(name):
    declaration = KNOWN_LOSSES[name]
    extra = {key: tensor([1.0] * 4) for key in ("sequence_ratio_mask",) if key in declaration.required}
    header, arrays = judge(call(sampled(**extra), loss=name))
    assert header["loss_fn_config"] == dict(declaration.config)
    assert {f"input.{key}" for key in declaration.required} <= set(arrays)


def test_loss_config_defaults_and_wrong_values():
    ppo = KNOWN_LOSSES["ppo"]
    assert passes.loss_config("ppo", ppo, {"clip_low_threshold": 0.5}) == {
        "clip_low_threshold": 0.5,
        "clip_high_threshold": 1.2,
    }
    for value in (math.nan, math.inf, "0.5"):
        with pytest.raises(RequestError, match="expected a finite number"):
            passes.loss_config("ppo", ppo, {"clip_low_threshold": value})


# ---- uploaded losses


@pytest.fixture
def uploaded(tmp_path: Path) -> CustomLosses:
    return CustomLosses(tmp_path / "custom_losses")


def judge_custom(uploaded: CustomLosses, name: str, *data: WireDatum) -> passes.Judged:
    loss_id = uploaded.create(custom_losses.payload(custom_losses.handle(name)))
    return passes.forward_backward(custom(loss_id, *data), BASE, passes.Losses(uploaded))


def test_an_uploaded_loss_is_known_after_a_restart_and_has_one_file(uploaded, tmp_path):
    body = custom_losses.payload(custom_losses.handle("focal"))
    loss_id = uploaded.create(body)
    assert uploaded.create({**body, "session_id": "another"}) == loss_id
    assert [file.name for file in (tmp_path / "custom_losses").iterdir()] == [f"{loss_id}.json"]
    stored, loss = CustomLosses(tmp_path / "custom_losses").get(loss_id)
    assert stored == body and loss == uploaded.get(loss_id)[1]
    answer = answer_of_creation(creation_id("s-1", 3, loss_id))
    assert answer is not None and wire.parse_json(answer.body) == {"type": "create_custom_loss", "loss_id": loss_id}
    assert answer_of_creation("s-1:train:0:7") is None


def test_a_pass_of_an_uploaded_loss_carries_graph_and_shapes(uploaded):
    """Inputs it does not read are left out; a number of each datum has no shape."""
    rows = [
        good(n, ref=tensor([-1.0] * n), mask=tensor([1.0] * n), beta=tensor([0.5], shape=(1,)), extra=tensor([1.0]))
        for n in (4, 2)
    ]
    header, arrays = judge_custom(uploaded, "dpo_like", *rows)
    assert header["loss_fn"] == "custom" and header["custom_loss"]["name"] == "dpo_like"
    assert header["input_keys"] == ["target_tokens"]
    assert arrays["custom.beta"].tolist() == [0.5, 0.5] and "shapes.beta" not in arrays
    assert arrays["shapes.ref"].tolist() == [[4], [2]] and arrays["custom.ref"].size == 6
    assert not {"custom.extra", "custom.weights", "input.weights"} & set(arrays)


WRONG_CUSTOM = {
    "missing": (good(ref=tensor([0.0] * 4), beta=tensor([1.0])), "lacks mask, which custom loss 'dpo_like' takes"),
    "rank": (
        good(ref=tensor([[0.0]] * 4), mask=tensor([1.0] * 4), beta=tensor([1.0])),
        "['ref'] has shape [4, 1], rank 2; custom loss 'dpo_like' declared ref with rank 1",
    ),
    "not a number": (
        good(ref=tensor([0.0] * 4), mask=tensor([1.0] * 4), beta=tensor([1.0, 2.0])),
        "['beta'] has shape [2], rank 1; custom loss 'dpo_like' declared beta with rank 0",
    ),
    "logprobs of another rank": (
        good(target_tokens=tensor([[1, 2]] * 4, "int64"), ref=tensor([0.0]), mask=tensor([0.0]), beta=tensor([1.0])),
        "has shape [4, 2]; custom loss 'dpo_like' declared logprobs, which have the shape of target_tokens, with",
    ),
    "shape that lies": (
        good(ref=tensor([0.0] * 4, shape=(2**40,)), mask=tensor([1.0] * 4), beta=tensor([1.0])),
        "values are taken",
    ),
    "negative shape": (
        good(ref=tensor([0.0] * 4, shape=(-4,)), mask=tensor([1.0] * 4), beta=tensor([1.0])),
        "values are taken",
    ),
    "target beyond the vocabulary": (
        good(
            target_tokens=tensor([1, 2, 3, 100], "int64"),
            ref=tensor([0.0] * 4),
            mask=tensor([1.0] * 4),
            beta=tensor([1.0]),
        ),
        "['target_tokens'][3] is token id 100",
    ),
}


@pytest.mark.parametrize("name", WRONG_CUSTOM)
def test_wrong_inputs_of_an_uploaded_loss_are_named(uploaded, name):
    datum, words = WRONG_CUSTOM[name]
    with pytest.raises(RequestError) as caught:
        judge_custom(uploaded, "dpo_like", datum)
    assert words in str(caught.value)


# ---- stable_reinforce, where the user's configuration says what it stands for


def test_stable_reinforce_stands_for_importance_sampling_where_the_user_says_so():
    plain = judge(call(sampled(), loss="importance_sampling"))
    for config in ({}, {"kl_coeff": 0.0}, {"kl_coeff": "0.0"}):
        header, arrays = judge(
            call(sampled(), loss="stable_reinforce", config=config), stable_reinforce=plain[0]["loss_fn"]
        )
        assert header == plain[0]
        assert all(np.array_equal(arrays[key], plain[1][key]) for key in plain[1])
    with pytest.raises(RequestError, match=r"kl_coeff'\] is 0\.1, but your configuration lets"):
        judge(
            call(sampled(), loss="stable_reinforce", config={"kl_coeff": 0.1}), stable_reinforce="importance_sampling"
        )
