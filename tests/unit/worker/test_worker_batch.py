"""Records to data and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_adapters.interface import ModelInfo, PassOutput
from megatron_adapters.sample_request import PromptScores, SampledSequence, SampleResult, TokenLogprobs
from tinker_hpc.base_models import BaseModel
from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import sampling
from tinker_hpc.log import Record, decode, encode
from tinker_hpc.worker.batch import lora_spec, num_loss_tokens, pass_result, sample_result, to_data, to_sample

INFO = ModelInfo("qwen3", vocab_size=50, max_context=64, num_layers=2, hidden_size=8, eos_token_ids=(2, 3))


def pass_request(**changes: Any) -> Record:
    arrays = {
        "tokens": np.arange(5, dtype=np.int32),
        "offsets": np.array([0, 2, 5]),
        "input.target_tokens": np.arange(5, dtype=np.int64) + 1,
        "input.weights": np.array([0, 1, 0, -0.5, 2], dtype=np.float32),
        "input.logprobs": -np.arange(5, dtype=np.float32),
    }
    header = {
        "op": "forward_backward",
        "loss_fn": "cross_entropy",
        "input_keys": ["target_tokens", "weights", "logprobs"],
        "trailing_shapes": {},
    }
    arrays |= changes.pop("arrays", {})
    return decode(encode(Record(header | changes, arrays)))


def test_ragged_data_are_cut_at_the_offsets_and_logprobs_renamed() -> None:
    first, second = to_data(pass_request())
    assert first.tokens.tolist() == [0, 1] and second.tokens.tolist() == [2, 3, 4]
    assert set(first.inputs) == {"target_tokens", "weights", "sampling_logprobs"}
    assert second.inputs["target_tokens"].tolist() == [3, 4, 5]
    assert second.inputs["sampling_logprobs"].tolist() == [-2, -3, -4]


def test_inputs_with_trailing_dimensions() -> None:
    request = pass_request(trailing_shapes={"weights": [2]}, arrays={"input.weights": np.arange(10, dtype=np.float32)})
    _, second = to_data(request)
    assert second.inputs["weights"].tolist() == [[4, 5], [6, 7], [8, 9]]
    assert num_loss_tokens(request) == 5


def test_tokens_that_count() -> None:
    assert num_loss_tokens(pass_request()) == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input.weights": np.array([0, 1, np.nan, 0, 0], np.float32)}, "NaN or infinity"),
        ({"input.weights": np.array([0, 1, np.inf, 0, 0], np.float32)}, "NaN or infinity"),
        ({"input.weights": np.ones(4, np.float32)}, "has 4 values beside 5 tokens: give 5"),
        ({"offsets": np.array([0, 2, 2, 5])}, "non-empty sequences"),
        ({"offsets": np.array([0, 2, 6])}, "non-empty sequences"),
        ({"offsets": np.array([0])}, "non-empty sequences"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        to_data(pass_request(arrays=arrays))


def test_a_missing_input_is_named() -> None:
    with pytest.raises(RequestError, match="needs target_tokens, weights; weights not given"):
        to_data(pass_request(input_keys=["target_tokens"]))


def test_pass_result_is_flat() -> None:
    output = PassOutput([np.array([-1, -2], np.float32), np.array([-3], np.float32)], 2.5, {"entropy:mean": 1.0})
    header, arrays = pass_result(output)
    assert header["metrics"] == {"loss:sum": 2.5, "entropy:mean": 1.0}
    assert arrays["logprobs"].tolist() == [-1, -2, -3] and arrays["offsets"].tolist() == [0, 2, 3]
    assert arrays["logprobs"].dtype == np.float32 and arrays["offsets"].dtype == np.int64
    assert header["trailing_shape"] == []


def test_pass_result_with_several_targets_a_token() -> None:
    header, arrays = pass_result(PassOutput([np.full((2, 3), -1.0), np.full((1, 3), -2.0)], 0.0))
    assert header["trailing_shape"] == [3]
    assert arrays["logprobs"].tolist() == [-1.0] * 6 + [-2.0] * 3 and arrays["offsets"].tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("stop", "token_ids", "strings"),
    [
        ({"type": "eos", "values": []}, {2, 3}, ()),
        ({"type": "none", "values": []}, set(), ()),
        ({"type": "tokens", "values": [7]}, {7}, ()),
        ({"type": "strings", "values": ["a", "b"]}, set(), ("a", "b")),
    ],
)
def test_stops(stop: dict[str, Any], token_ids: set[int], strings: tuple[str, ...]) -> None:
    header = {
        "num_samples": 2,
        "max_tokens": 4,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "seed": 11,
        "stop": stop,
        "prompt_logprobs": True,
    }
    request = to_sample(Record(header, {"prompt": np.array([1, 2], np.int32)}), INFO, snapshot_id="s")
    assert request.stop_token_ids == token_ids and request.stop_strings == strings
    assert (request.snapshot_id, request.num_samples, request.max_tokens, request.seed) == ("s", 2, 4, 11)
    assert (request.temperature, request.top_k, request.top_p, request.prompt_logprobs) == (0.5, 5, 0.9, True)


@pytest.mark.parametrize("given", [{}, {"max_tokens": None}, {"max_tokens": 7}])
def test_a_max_tokens_that_was_not_given_is_the_workers_to_choose(given: dict[str, Any]) -> None:
    base = BaseModel(
        name="org/tiny", folder=Path("/m"), config={}, vocab_size=50, max_context=64, hidden_size=8, model_type="qwen3"
    )
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    header, arrays = sampling.sample({"prompt": prompt, "sampling_params": {"seed": 1, **given}}, base)
    logged = decode(encode(Record(header, arrays)))
    assert to_sample(logged, INFO, snapshot_id=None).max_tokens == given.get("max_tokens")


def test_sample_result_is_flat() -> None:
    sequences = [
        SampledSequence(np.array([1, 2], np.int32), np.array([-1, -2], np.float32), "stop"),
        SampledSequence(np.array([], np.int32), np.array([], np.float32), "length"),
    ]
    plain = Record({}, {})
    scored = SampleResult(sequences, PromptScores(np.array([np.nan, -1], np.float32)))
    header, arrays = sample_result(plain, scored)
    assert header == {"stop_reasons": ["stop", "length"]}
    assert arrays["tokens"].tolist() == [1, 2] and arrays["offsets"].tolist() == [0, 2, 2]
    assert np.isnan(arrays["prompt_logprobs"][0])
    assert "prompt_logprobs" not in sample_result(plain, SampleResult(sequences))[1]


def test_what_is_asked_about_distributions_travels_there_and_back() -> None:
    header = {
        "num_samples": 1, "max_tokens": 1, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": 1,
        "stop": {"type": "none", "values": []}, "topk_sample_logprobs": 2, "topk_prompt_logprobs": 1,
        "prompt_alt_tokens_k": 3, "target_shape": [2, 9],
    }  # fmt: skip
    sparse = {
        "target_ids": np.array([4, 5, 6]), "target_crow": np.array([0, 1, 3]), "target_col": np.array([8, 0, 1]),
    }  # fmt: skip
    record = Record(header, {"prompt": np.array([1, 2, 3], np.int32), **sparse})
    request = to_sample(record, INFO, snapshot_id=None)
    assert request.target_prompt_logprobs is not None and request.scores_prompt
    assert request.target_prompt_logprobs.rows.tolist() == [0, 1, 1]
    assert (request.topk_sample_logprobs, request.topk_prompt_logprobs, request.prompt_alt_tokens_k) == (2, 1, 3)
    dense = Record({**header, "target_shape": [2, 2]}, {"prompt": record.arrays["prompt"], "target_ids": np.arange(4)})
    asked = to_sample(dense, INFO, snapshot_id=None).target_prompt_logprobs
    assert asked is not None and asked.rows.tolist() == [0, 0, 1, 1]

    def pairs(rows: int, k: int) -> TokenLogprobs:
        return TokenLogprobs(np.zeros((rows, k), np.int32), -np.ones((rows, k), np.float32))

    sequence = SampledSequence(np.array([1], np.int32), np.array([-1], np.float32), "length", pairs(1, 2))
    scores = PromptScores(None, pairs(3, 1), np.array([-1, -2, -3], np.float32), pairs(2, 3))
    fields, arrays = sample_result(record, SampleResult([sequence], scores))
    assert (fields["topk_sample"], fields["topk_prompt"], fields["prompt_alt_tokens_k"]) == (2, 1, 3)
    assert fields["target_shape"] == [2, 9] and arrays["target_col"].tolist() == [8, 0, 1]
    assert {name: array.size for name, array in arrays.items() if "topk" in name or "alt" in name} == {
        "topk_sample_ids": 2, "topk_sample_logprobs": 2, "topk_prompt_ids": 3, "topk_prompt_logprobs": 3,
        "alt_tokens": 6, "alt_logprobs": 6,
    }  # fmt: skip


def test_lora_spec_takes_what_is_said() -> None:
    spec = lora_spec({"lora": {"rank": 8, "seed": 3, "train_mlp": False, "train_attn": True}})
    assert (spec.rank, spec.seed, spec.train_mlp, spec.train_attn, spec.train_unembed) == (8, 3, False, True, True)
    assert spec.alpha == 32 and not spec.per_expert
    assert lora_spec({"lora": {"rank": 8, "seed": 3, "per_expert": True}}).per_expert
