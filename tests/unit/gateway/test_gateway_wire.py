"""wire.py against the SDK's own converters: what the stock client writes we read, what we write it reads."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import wire

token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)
floats32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


def sdk_bytes(data: list[tinker.Datum], loss: str = "cross_entropy", config=None, *, forward_only=False) -> bytes:
    request = ForwardBackwardRequest(
        forward_backward_input=tinker.types.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config),
        model_id="s:train:0",
        seq_id=7,
    )
    message = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    return message.SerializeToString()


def datum(tokens: list[int], weights: list[float]) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[::-1], dtype="int64", shape=[len(tokens)]),
            "weights": tinker.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
        },
    )


@given(st.lists(st.tuples(token_ids, st.lists(floats32, max_size=20)), min_size=1, max_size=5), st.booleans())
def test_reads_what_the_sdk_writes(rows, forward_only):
    body = sdk_bytes([datum(tokens, weights) for tokens, weights in rows], forward_only=forward_only)
    call = wire.decode_forward_backward(body)
    assert (call.model_id, call.seq_id, call.loss_fn, call.forward_only) == (
        "s:train:0",
        7,
        "cross_entropy",
        forward_only,
    )
    for (tokens, weights), got in zip(rows, call.data, strict=True):
        assert got.tokens.tolist() == tokens
        assert got.inputs["target_tokens"].values.tolist() == tokens[::-1]
        np.testing.assert_array_equal(got.inputs["weights"].values, np.array(weights, np.float32))
        assert got.inputs["weights"].shape == (len(weights),)


def test_chunks_of_a_model_input_are_joined():
    chunks = [tinker.EncodedTextChunk(tokens=[1, 2]), tinker.EncodedTextChunk(tokens=[3])]
    body = sdk_bytes([tinker.Datum(model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs={})])
    assert wire.decode_forward_backward(body).data[0].tokens.tolist() == [1, 2, 3]


def test_an_image_is_named_and_a_sparse_tensor_marked():
    chunks = [tinker.types.ImageChunk(data=b"x", format="png")]
    sparse = tinker.TensorData(
        data=[5], dtype="int64", shape=[1, 4], sparse_crow_indices=[0, 1], sparse_col_indices=[2]
    )
    body = sdk_bytes(
        [tinker.Datum(model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs={"target_tokens": sparse})]
    )
    got = wire.decode_forward_backward(body).data[0]
    assert got.other_chunks == ("image",)
    parts = got.inputs["target_tokens"].parts
    assert [part.tolist() for part in parts] == [[5], [0, 1], [2]] and got.inputs["target_tokens"].shape == (1, 4)


def test_text_and_numbers_in_the_loss_config():
    body = sdk_bytes([datum([1], [1.0])], loss="ppo", config={"clip_low_threshold": 0.5, "mode": "strict"})
    assert dict(wire.decode_forward_backward(body).loss_fn_config) == {"clip_low_threshold": 0.5, "mode": "strict"}


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"not protobuf at all"])
def test_other_bytes_are_refused_with_words(body):
    with pytest.raises(RequestError, match="protobuf ForwardBackwardRequest"):
        wire.decode_forward_backward(body)


def test_torn_tensor_bytes_name_their_place():
    message = wire.messages.ForwardBackwardRequest(model_id="m", seq_id=1)
    added = message.data.add()
    added.model_input.add().encoded_text.tokens = b"\x01\x00\x00"
    with pytest.raises(RequestError, match=r"data\[0\]\.model_input has 3 bytes"):
        wire.decode_forward_backward(message.SerializeToString())


def test_the_digest_sees_values_not_serialization():
    first = wire.messages.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    second = wire.messages.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for message, keys in ((first, ("a", "b")), (second, ("b", "a"))):
        added = message.data.add()
        added.model_input.add().encoded_text.tokens = np.array([1, 2], "<i4").tobytes()
        for key in keys:
            tensor = added.loss_fn_inputs[key]
            tensor.dense, tensor.dtype = np.array([ord(key), 0.0], "<f4").tobytes(), wire.messages.DTYPE_FLOAT32
    one, other = (wire.decode_forward_backward(m.SerializeToString()) for m in (first, second))
    assert wire.forward_backward_digest(one) == wire.forward_backward_digest(other)


@given(st.lists(token_ids, min_size=2, max_size=3), st.data())
def test_the_digest_changes_with_any_value(rows, data):
    calls = [wire.decode_forward_backward(sdk_bytes([datum(t, [1.0] * len(t)) for t in rows]))]
    changed = [list(tokens) for tokens in rows]
    where = data.draw(st.integers(0, len(rows) - 1))
    changed[where][data.draw(st.integers(0, len(changed[where]) - 1))] ^= 1
    calls.append(wire.decode_forward_backward(sdk_bytes([datum(t, [1.0] * len(t)) for t in changed])))
    assert wire.forward_backward_digest(calls[0]) != wire.forward_backward_digest(calls[1])


@given(st.lists(st.lists(floats32, max_size=6), min_size=1, max_size=6), floats32)
def test_the_sdk_reads_our_forward_backward_output(rows, loss):
    flat = np.array([x for row in rows for x in row], np.float32)
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    body = wire.encode_forward_backward_output({"metrics": {"loss:sum": loss}}, {"logprobs": flat, "offsets": offsets})
    output = deserialize_forward_backward_output(body)
    np.testing.assert_array_equal(output.metrics["loss:sum"], loss)
    assert len(output.loss_fn_outputs) == len(rows)
    for row, got in zip(rows, output.loss_fn_outputs, strict=True):
        assert got["logprobs"].shape == [len(row)]
        np.testing.assert_array_equal(got["logprobs"].to_numpy(), np.array(row, np.float32))


def test_the_sdk_reads_several_logprobs_a_token():
    flat = np.arange(15, dtype=np.float32)
    header = {"metrics": {}, "trailing_shape": [3]}
    body = wire.encode_forward_backward_output(header, {"logprobs": flat, "offsets": np.array([0, 2, 5])})
    first, second = (got["logprobs"] for got in deserialize_forward_backward_output(body).loss_fn_outputs)
    assert first.shape == [2, 3] and second.shape == [3, 3]
    np.testing.assert_array_equal(second.to_numpy(), flat[6:].reshape(3, 3))


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=6), st.sampled_from(["stop", "length"])),
        min_size=1,
        max_size=4,
    ),
    st.one_of(st.none(), st.lists(floats32, min_size=2, max_size=8)),
)
def test_the_sdk_reads_our_sample_response(sequences, prompt):
    tokens = np.array([t for row, _ in sequences for t in row], np.int32)
    arrays = {
        "tokens": tokens,
        "logprobs": -tokens.astype(np.float32),
        "offsets": np.cumsum([0, *(len(row) for row, _ in sequences)]).astype(np.int64),
    }
    if prompt is not None:
        arrays["prompt_logprobs"] = np.array([math.nan, *prompt], np.float32)
    response = deserialize_sample_response(
        wire.encode_sample_response({"stop_reasons": [reason for _, reason in sequences]}, arrays)
    )
    for (row, reason), got in zip(sequences, response.sequences, strict=True):
        assert (got.tokens, got.stop_reason) == (row, reason)
        np.testing.assert_array_equal(got.logprobs or [], -np.array(row, np.float32))
    if prompt is None:
        assert response.prompt_logprobs is None
    else:
        assert response.prompt_logprobs is not None
        assert response.prompt_logprobs[0] is None  # NaN on the wire is None for the user
        for given_value, got_value in zip(prompt, response.prompt_logprobs[1:], strict=True):
            assert got_value is None if math.isnan(given_value) else got_value == given_value


def test_the_sdk_reads_what_was_asked_about_distributions():
    header = {"stop_reasons": ["stop", "length"], "topk_sample": 2, "topk_prompt": 2, "prompt_alt_tokens_k": 3}
    arrays = {
        "tokens": np.array([1, 2, 3], np.int32),
        "logprobs": np.array([-1.0, -2.0, -3.0], np.float32),
        "offsets": np.array([0, 1, 3]),
        "topk_sample_ids": np.arange(6, dtype=np.int32),
        "topk_sample_logprobs": -np.arange(6, dtype=np.float32),
        "topk_prompt_ids": np.array([0, 0, 7, 8], np.int32),
        "topk_prompt_logprobs": np.array([-99999.0, -99999.0, -1.0, -2.0], np.float32),
        "alt_tokens": np.array([4, 5, 4], np.int32),
        "alt_logprobs": np.array([-1.0, -2.0, -1.0], np.float32),
        "target_logprobs": np.array([-5.0, 0.0], np.float32),
    }
    response = deserialize_sample_response(wire.encode_sample_response({**header, "target_shape": [1, 2]}, arrays))
    first, second = response.sequences
    assert first.topk_logprobs == [[(0, 0.0), (1, -1.0)]]
    assert second.topk_logprobs == [[(2, -2.0), (3, -3.0)], [(4, -4.0), (5, -5.0)]]
    assert response.topk_prompt_logprobs == [None, [(7, -1.0), (8, -2.0)]], "an empty place is None for the user"
    drawn = response.prompt_alt_tokens
    assert drawn is not None and drawn.tokens.shape == [1, 3] and list(drawn.tokens.data) == [4, 5, 4]
    assert drawn.tokens.dtype == "int64" and list(drawn.logprobs.data) == [-1.0, -2.0, -1.0]
    target = response.target_prompt_logprobs
    assert target is not None and target.shape == [1, 2] and list(target.data) == [-5.0, 0.0]

    sparse = {**arrays, "target_crow": np.array([0, 2]), "target_col": np.array([1, 6])}
    response = deserialize_sample_response(wire.encode_sample_response({**header, "target_shape": [1, 9]}, sparse))
    target = response.target_prompt_logprobs
    assert target is not None and target.shape == [1, 9] and list(target.data) == [-5.0, 0.0]
    assert (target.sparse_crow_indices, target.sparse_col_indices) == ([0, 2], [1, 6])


def test_a_prompt_of_one_token_has_no_place_for_candidates():
    header = {"stop_reasons": ["stop"], "topk_prompt": 2, "prompt_alt_tokens_k": 3}
    arrays = {
        "tokens": np.array([1], np.int32), "logprobs": np.array([-1.0], np.float32), "offsets": np.array([0, 1]),
        "topk_prompt_ids": np.zeros(2, np.int32), "topk_prompt_logprobs": np.full(2, -99999.0, np.float32),
        "alt_tokens": np.zeros(0, np.int32), "alt_logprobs": np.zeros(0, np.float32),
    }  # fmt: skip
    response = deserialize_sample_response(wire.encode_sample_response(header, arrays))
    assert response.topk_prompt_logprobs == [None]
    assert response.prompt_alt_tokens is not None and response.prompt_alt_tokens.tokens.shape == [0, 3]


def test_nan_in_json_survives_both_ways():
    assert math.isnan(wire.parse_json(b'{"learning_rate": NaN}')["learning_rate"])
    assert math.isnan(
        json.loads(wire.json_bytes({"metrics": {"grad_norm:mean": math.nan}}))["metrics"]["grad_norm:mean"]
    )


@pytest.mark.parametrize("body", [b"[1, 2]", b"{", b"\xff"])
def test_json_that_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match="JSON"):
        wire.parse_json(body)


def test_json_digests_ignore_order_and_what_a_retry_may_change():
    one = wire.json_digest({"a": 1, "b": [1, 2], "n": 5}, without=("n",))
    assert one == wire.json_digest({"b": [1, 2], "n": 6, "a": 1}, without=("n",))
    assert one != wire.json_digest({"b": [2, 1], "n": 5, "a": 1}, without=("n",))


@pytest.mark.parametrize("depth", [wire.MAX_DEPTH + 1, 900, 100_000])
def test_json_nested_too_deep_is_refused(depth):
    with pytest.raises(RequestError, match="nested more than 64 deep"):
        wire.parse_json(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    flat = wire.parse_json(b'{"a":' + b"[[1]]" + b',"b":[' + b"[]," * depth + b"[]]}")
    assert len(flat["b"]) == depth + 1


def test_digests_of_what_is_no_64_bit_integer_and_no_utf8():
    digests = {wire.json_digest({"a": value}) for value in (10**30, 10**30 + 1, "\ud800", float("nan"))}
    assert len(digests) == 4


@pytest.mark.parametrize("tokens", [5, "56", [5.5], [True], [[5]], [2**70], ["5"], None])
def test_prompt_tokens_are_integers_or_refused(tokens):
    with pytest.raises(RequestError, match="integers"):
        wire.prompt_tokens({"chunks": [{"type": "encoded_text", "tokens": tokens}]})


def test_the_gateway_imports_neither_torch_nor_the_sdk():
    heavy = "('torch', 'transformers', 'tinker')"
    code = f"import sys, tinker_hpc.gateway.__main__; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
