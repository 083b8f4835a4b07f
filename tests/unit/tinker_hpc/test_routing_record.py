"""The experts of sampled sequences: into a result, out of it, and found again by a datum's tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tinker_hpc import log
from tinker_hpc.gateway.wire import encode_sample_response
from tinker_hpc.log.record import decode as decode_record
from tinker_hpc.log.record import encode as encode_record
from tinker_hpc.routing_record import Sampled, SampledIndex, Source, decode, encode, key_of

PROMPT = np.array([5, 6, 7], np.int32)


def experts(seed: int, rows: int, dtype: type = np.uint8, count: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (rows, 4, 2)).astype(dtype)


def samples(dtype: type = np.uint8, count: int = 256) -> list[Sampled]:
    """The second has a prompt of its own, computed apart; the third is a single token."""
    shared = experts(0, 3, dtype, count)
    return [
        Sampled(np.array([1, 2, 3], np.int32), shared, experts(1, 2, dtype, count)),
        Sampled(np.array([1, 2], np.int32), experts(2, 3, dtype, count), experts(3, 1, dtype, count)),
        Sampled(np.array([9], np.int32), shared.copy(), experts(4, 0, dtype, count)),
    ]


@pytest.mark.parametrize(("dtype", "count"), [(np.uint8, 256), (np.int16, 384)])
def test_each_sample_comes_back_from_the_log(dtype: type, count: int) -> None:
    field, array = encode(PROMPT, samples(dtype, count))
    record = decode_record(encode_record(log.Record({"experts": field}, {"experts": array})))
    assert record.arrays["experts"].dtype == dtype
    assert len(array) == 2 * 3 + 2 + 1, "the prompt that two samples share is there once"
    for place, sample in enumerate(samples(dtype, count)):
        found = decode(record.header, record.arrays, place)
        np.testing.assert_array_equal(found, np.concatenate([sample.prompt_experts, sample.experts]))


def result(number: int, request_id: str = "s:1") -> dict[str, object]:
    field, _ = encode(PROMPT, samples())
    return {"request_id": request_id, "fence": 2, "number": number, "experts": field}


def test_a_datum_is_the_prompt_and_all_but_the_last_sampled_token() -> None:
    index = SampledIndex()
    index.add(result(7))

    def find(*tokens: int) -> Source | None:
        return index.find(np.array(tokens, np.int64), lambda _: True)

    assert find(5, 6, 7, 1, 2) == Source(2, 7, 0)
    assert find(5, 6, 7, 1) == Source(2, 7, 1)
    assert find(5, 6, 7) == Source(2, 7, 2)
    assert find(5, 6, 7, 1, 2, 3) is find(5, 6) is find(6, 7, 1, 2) is None


def test_the_newest_of_equal_sequences_is_taken_and_none_that_was_taken_back() -> None:
    index = SampledIndex()
    for number, request_id in enumerate(("s:1", "s:2"), start=7):
        index.add(result(number, request_id))
    tokens = np.array([5, 6, 7, 1, 2], np.int32)
    assert index.find(tokens, lambda _: True) == Source(2, 8, 0)
    assert index.find(tokens, lambda request_id: request_id != "s:2") is None


def test_the_oldest_are_forgotten() -> None:
    index = SampledIndex(most=4)
    index.add(result(7))
    later = result(8)
    later["experts"] = {"keys": [key_of(np.array([n])) for n in range(3)]}
    index.add(later)
    assert index.find(np.array([5, 6, 7, 1, 2]), lambda _: True) is None
    assert index.find(np.array([5, 6, 7]), lambda _: True) == Source(2, 7, 2)
    assert index.find(np.array([2]), lambda _: True) == Source(2, 8, 2)


def test_the_sdk_is_not_sent_them() -> None:
    field, array = encode(PROMPT, samples()[:1])
    arrays = {"tokens": np.array([1, 2, 3]), "logprobs": np.zeros(3), "offsets": np.array([0, 3])}
    header = {"stop_reasons": ["stop"]}
    plain = encode_sample_response(header, arrays)
    assert encode_sample_response({**header, "experts": field}, {**arrays, "experts": array}) == plain
