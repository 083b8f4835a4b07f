"""The experts of sampled sequences: how they stand beside a sample's result, and how training data find them again.

A sequence is known by its tokens that went through the model: the prompt and all sampled ones but the last. A datum
with just these tokens is that sequence, to be trained. Pure.

In a result: array `experts` uint8 or int16 [rows, M, K], the rows of each prompt that was computed and then those of
each sample; header `experts` {"keys", "rows"}, of each sample its key and [start, end of its prompt's rows, start, end
of its own].

Shapes: P prompt tokens, N sampled ones, M layers with experts, K experts of a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MOST_SEQUENCES = 2**17
"""A datum that was sampled longer ago than this many sequences is trained as the routers choose."""


class Sampled(NamedTuple):
    """One sample of a prompt."""

    tokens: np.ndarray
    """int32 [N]"""
    prompt_experts: np.ndarray
    """[P, M, K]"""
    experts: np.ndarray
    """[N - 1, M, K]"""


class Source(NamedTuple):
    """Where the experts of a sequence are: fence and number of a result, and which of its samples."""

    fence: int
    number: int
    sample: int


def key_of(tokens: np.ndarray) -> str:
    """Of the tokens that went through the model: BLAKE2b of 16 bytes, of int32 little endian."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=16).hexdigest()


def encode(prompt: np.ndarray, samples: Sequence[Sampled]) -> tuple[dict[str, Any], np.ndarray]:
    """The header field and the array of a result. Samples whose prompts were routed alike share their rows.

    prompt: int32 [P].
    """
    prompts: list[np.ndarray] = []
    places = []
    for sample in samples:
        same = (place for place, known in enumerate(prompts) if _equal(known, sample.prompt_experts))
        place = next(same, len(prompts))
        if place == len(prompts):
            prompts.append(sample.prompt_experts)
        places.append(place)
    position = len(prompts) * len(prompt)
    rows = []
    for sample, place in zip(samples, places, strict=True):
        rows.append([place * len(prompt), (place + 1) * len(prompt), position, position + len(sample.experts)])
        position += len(sample.experts)
    keys = [key_of(np.concatenate([prompt, sample.tokens[:-1]])) for sample in samples]
    return {"keys": keys, "rows": rows}, np.concatenate([*prompts, *(sample.experts for sample in samples)])


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or np.array_equal(one, other)


def decode(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], sample: int) -> np.ndarray:
    """[P + N - 1, M, K] of one sample of a result. Raises: KeyError, IndexError where the result has none."""
    start, end, sampled_start, sampled_end = header["experts"]["rows"][sample]
    experts = arrays["experts"]
    return np.concatenate([experts[start:end], experts[sampled_start:sampled_end]])


class SampledIndex:
    """The sequences of a result log, newest first where several are equal. `add` from one thread, `find` from any."""

    def __init__(self, most: int = MOST_SEQUENCES) -> None:
        self._found: dict[str, tuple[str, Source]] = {}
        self._most = most

    def add(self, result: Mapping[str, Any]) -> None:
        """Take in the header of a result, in the order of the log."""
        for sample, key in enumerate(result["experts"]["keys"]):
            self._found.pop(key, None)  # to the end, so that the oldest are the first
            self._found[key] = (result["request_id"], Source(result["fence"], result["number"], sample))
        while len(self._found) > self._most:
            del self._found[next(iter(self._found))]

    def find(self, tokens: np.ndarray, counts: Callable[[str], bool]) -> Source | None:
        """Where the experts of these tokens are; None if they were not sampled, or by a request that was taken back."""
        request_id, source = self._found.get(key_of(tokens), ("", None))
        return source if source is not None and counts(request_id) else None
