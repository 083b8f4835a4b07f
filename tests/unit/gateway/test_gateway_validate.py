"""validate.py and sampling.py: every wrong request is named with what was given, expected, and what to change."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_hpc.base_models import BaseModel
from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import sampling, validate

BASE = BaseModel(
    name="org/tiny",
    folder=Path("/models/tiny"),
    config={},
    vocab_size=100,
    max_context=16,
    hidden_size=48,
    model_type="qwen3",
)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"learning_rate": math.nan}, "AdamParams.learning_rate is nan, expected a finite number"),
        ({"learning_rate": None}, "AdamParams.learning_rate is nan"),
        ({"learning_rate": -1.0}, "AdamParams.learning_rate is -1.0, expected 0 or more"),
        ({"beta1": 1.0}, "AdamParams.beta1 is 1.0, expected 0 <= beta1 < 1"),
        ({"beta2": math.inf}, "AdamParams.beta2 is inf"),
        ({"learning_rate": 10**400}, "AdamParams.learning_rate is inf, expected a finite number"),
        ({"weight_decay": -(10**400)}, "AdamParams.weight_decay is -inf"),
        ({"eps": "tiny"}, "AdamParams.eps is 'tiny', expected a number"),
        ({"eps": 0.0}, "AdamParams.eps is 0.0, expected 1e-30 or more"),
        ({"grad_clip_norm": -1}, "0 turns clipping off"),
        ({"lr": 1.0}, "adam_params has lr; known are learning_rate"),
    ],
)
def test_wrong_adam_params(params, words):
    with pytest.raises(RequestError) as caught:
        validate.adam({"adam_params": params})
    assert words in str(caught.value)


def test_adam_defaults_are_tinkers_and_dimuon_is_refused():
    assert validate.adam({"adam_params": {}}) == dict(validate.ADAM_DEFAULTS)
    with pytest.raises(RequestError, match="'dimuon'; this version has AdamW"):
        validate.adam({"optimizer_params": {"type": "dimuon", "learning_rate": 1.0}})
    with pytest.raises(RequestError, match=r"optimizer \[1\]; this version has AdamW"):
        validate.adam({"optimizer_params": [1]})


@pytest.mark.parametrize("rank", [0, -8, 3, 12, 33, 2.0, True, None, "8"])
def test_wrong_ranks(rank):
    with pytest.raises(RequestError, match="Tinker takes powers of two"):
        validate.lora({"rank": rank}, BASE)


def test_ranks():
    for rank in (1, 2, 4, 8, 16, 32):
        assert validate.lora({"rank": rank, "seed": 5, "train_mlp": False}, BASE) == {
            "rank": rank,
            "seed": 5,
            "train_mlp": False,
            "train_attn": True,
            "train_unembed": True,
        }
    with pytest.raises(RequestError, match=r"more than the hidden size of org/tiny \(48\).*at most 32"):
        validate.lora({"rank": 64}, BASE)
    with pytest.raises(RequestError, match="nothing would be trained"):
        validate.lora({"rank": 8, "train_mlp": False, "train_attn": False, "train_unembed": False}, BASE)


@given(st.text(max_size=30))
def test_a_checkpoint_name_never_leaves_its_folder(name):
    try:
        accepted = validate.checkpoint_name(name)
    except RequestError:
        return
    assert (Path("/root/folder") / accepted).resolve().parent == Path("/root/folder")
    assert accepted == name


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", None, "a" * 129, "a\x00b", "-rf"])
def test_wrong_checkpoint_names(name):
    with pytest.raises(RequestError, match="checkpoint name"):
        validate.checkpoint_name(name)


def test_ttl():
    assert validate.ttl_seconds(None) is None
    assert validate.ttl_seconds(3600) == 3600
    for wrong in (0, 3599, 10**9, 3600.0, True):
        with pytest.raises(RequestError, match="one hour"):
            validate.ttl_seconds(wrong)


# --- sampling ---------------------------------------------------------------------------------------------------


def prompt(*tokens: int) -> dict:
    return {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}


def test_a_good_sample():
    payload = {
        "prompt": prompt(1, 2),
        "num_samples": 3,
        "sampling_params": {"max_tokens": 4, "seed": 9, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "stop": ["\n"]},
        "prompt_logprobs": True,
    }
    header, arrays = sampling.sample(payload, BASE)
    assert arrays.keys() == {"prompt"} and arrays["prompt"].tolist() == [1, 2] and arrays["prompt"].dtype == np.int32
    assert header == {
        "num_samples": 3,
        "max_tokens": 4,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "seed": 9,
        "stop": {"type": "strings", "values": ["\n"]},
        "prompt_logprobs": True,
        "prompt_logprobs_last_n": None,
    }


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, {"type": "eos", "values": []}),
        ([], {"type": "none", "values": []}),
        ("END", {"type": "strings", "values": ["END"]}),
        ([5, 6], {"type": "tokens", "values": [5, 6]}),
    ],
)
def test_stops(stop, expected):
    header, _ = sampling.sample({"prompt": prompt(1), "sampling_params": {"stop": stop}}, BASE)
    assert header["stop"] == expected
    assert header["max_tokens"] is None, "the worker knows what it has room for"


@pytest.mark.parametrize(("top_k", "expected"), [(-1, -1), (99, 99), (100, 100), (2**63, 100), (2**64, 100)])
def test_a_top_k_beyond_the_vocabulary_is_the_vocabulary(top_k, expected):
    header, _ = sampling.sample({"prompt": prompt(1), "sampling_params": {"top_k": top_k, "top_p": 0.5}}, BASE)
    assert header["top_k"] == expected


WRONG_SAMPLES = [
    ({"prompt": {"chunks": "x"}}, "prompt must be a ModelInput"),
    ({"prompt": prompt()}, "the prompt is empty"),
    ({"prompt": prompt(1, 100)}, "prompt[1] is token id 100; org/tiny has ids 0 to 99"),
    ({"prompt": prompt(-1)}, "prompt[0] is token id -1"),
    ({"prompt": prompt(2**70)}, "prompt tokens must be integers"),
    ({"prompt": {"chunks": [{"type": "image", "data": ""}]}}, "reads text only"),
    ({"prompt": prompt(*range(16))}, "no room for a new token"),
    ({"sampling_params": {"max_tokens": 16}}, "make 17, more than the context of org/tiny, 16. Use max_tokens=15"),
    ({"sampling_params": {"max_tokens": 0}}, "max_tokens is 0"),
    ({"sampling_params": {"temperature": -0.1}}, "expected 0 (greedy), or 1e-06 or more"),
    ({"sampling_params": {"temperature": 1e-9}}, "temperature is 1e-09, expected 0 (greedy)"),
    ({"sampling_params": {"temperature": math.nan}}, "temperature is nan"),
    ({"sampling_params": {"temperature": 10**400}}, "temperature is inf"),
    ({"sampling_params": {"top_k": 0}}, "top_k is 0, expected 1 or more, or -1"),
    ({"sampling_params": {"top_p": 0}}, "top_p is 0.0, expected 0 < top_p <= 1"),
    ({"sampling_params": {"top_p": 1.5}}, "top_p is 1.5"),
    ({"sampling_params": {"seed": -1}}, "seed is -1"),
    ({"sampling_params": {"stop": ["a", 1]}}, "texts only, or token ids only"),
    ({"sampling_params": {"stop": [""]}}, "non-empty"),
    ({"sampling_params": {"stop": [1000]}}, "stop has token id 1000"),
    ({"num_samples": 0}, "num_samples is 0, expected an integer of 1 or more"),
    ({"num_samples": 10**9}, "at most 4096 a request"),
    ({"topk_sample_logprobs": 101}, "topk_sample_logprobs is 101, expected 0 (off) to 100"),
    ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs is -1"),
    ({"prompt_alt_tokens_k": True}, "prompt_alt_tokens_k is True"),
    (
        {"topk_sample_logprobs": 100, "num_samples": 4096},
        "at 61440 places make 6144000 numbers, at most 4194304",
    ),
    ({"prompt_logprobs_last_n": 5}, "prompt_logprobs_last_n is 5"),
    ({"prompt": prompt(1, 2), "prompt_logprobs_last_n": 1}, "set include_prompt_logprobs=True"),
]


def targets(ids, shape, **more):
    tensor = {"dtype": "int64", "data": ids, "shape": shape, **more}
    return {"prompt": prompt(1, 2, 3), "target_prompt_logprobs": tensor}


def test_good_targets():
    header, arrays = sampling.sample(targets([5, -1, 7, 8], [2, 2]), BASE)
    assert header["target_shape"] == [2, 2] and arrays["target_ids"].tolist() == [5, -1, 7, 8]
    sparse = {"sparse_crow_indices": [0, 0, 1], "sparse_col_indices": [3]}
    header, arrays = sampling.sample(targets([9], [2, 4], **sparse), BASE)
    assert header["target_shape"] == [2, 4] and arrays["target_crow"].tolist() == [0, 0, 1]


WRONG_SAMPLES += [
    (targets([5], [1, 1]), "has 1 rows; a prompt of 3 tokens needs 2"),
    (targets([5, 6], [2]), "has shape [2], expected [2, K]"),
    (targets([5, 6], [2, 2]), "has 2 ids, its shape [2, 2] says 4"),
    (targets([5, 100], [2, 1]), "has token id 100; org/tiny has ids 0 to 99"),
    (targets([5, -2], [2, 1]), "has token id -2"),
    (targets([-1, -1], [2, 1]), "names no token id at all"),
    (targets([5, 2**70], [2, 1]), "beyond 64 bits"),
    (targets([5.0, 1.0], [2, 1]), "list of integers"),
    (targets([5], [2, 4], sparse_crow_indices=[0, 2, 1], sparse_col_indices=[0]), "no CSR tensor of shape [2, 4]"),
    (targets([5], [2, 4], sparse_crow_indices=[0, 1, 1], sparse_col_indices=[4]), "no CSR tensor of shape [2, 4]"),
    ({"target_prompt_logprobs": {"dtype": "float32", "data": [], "shape": [0, 0]}}, "must be an int64 tensor"),
]


def test_stability_info_is_let_pass():
    header, _ = sampling.sample({"prompt": prompt(1), "record_stability_info": True}, BASE)
    assert "record_stability_info" not in header


@pytest.mark.parametrize(("changed", "words"), WRONG_SAMPLES)
def test_wrong_samples_are_named(changed, words):
    with pytest.raises(RequestError) as caught:
        sampling.sample({"prompt": prompt(1), "sampling_params": {}, **changed}, BASE)
    assert words in str(caught.value)
