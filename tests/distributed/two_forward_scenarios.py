"""The sampling and the training forward on the same tokens, as whole distributions; see test_two_forwards.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
from jobs import Ground
from parity_reference import RANK, VOCAB
from parity_scenarios import cross_entropy, start, train_unlike
from sampling_scenarios import ask

from megatron_adapters import sampler
from megatron_adapters.engine import Datum, Engine, LoraSpec, SampledSequence, SampleResult
from megatron_adapters.kv_cache import KvCache, KvShape

Outcome = dict[str, Any]

PROMPT_LENGTHS = (1, 5, 17, 40)
MAX_TOKENS = (11, 2, 7, 13)
"""of each prompt: sequences leave the batch at different steps"""
NUM_SAMPLES = 2
"""of each prompt: they share its keys and values, and go on differently"""


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(0, VOCAB, length, dtype=np.int32) for length in PROMPT_LENGTHS]


def both(ground: Ground) -> dict[str, Outcome]:
    return {dtype: _both(ground, dtype) for dtype in ("float32", "bfloat16")}


def little_cache(ground: Ground) -> list[list[SampleResult]]:
    """The same requests with all the room there is, and with room for three of their sequences at a time."""
    requests = [ask(prompt, None, num_samples=4, seed=seed) for seed, prompt in enumerate(prompts())]
    results = []
    for most_tokens in (10**6, 3 * 64):

        def cache(shape: KvShape, budget: int, *more: int, most_tokens: int = most_tokens) -> KvCache:
            return KvCache(shape, min(budget, most_tokens), *more)

        with mock.patch.object(sampler, "KvCache", cache):
            results.append(start(ground).engine.sample(requests))
    return results


def _both(ground: Ground, dtype: str) -> Outcome:
    """{weights: {"tokens": of each sequence, with its prompt; "starts": where its sampled tokens begin;
    "logprobs": the sampler's of these; "sampled", "trained": float32 [N, VOCAB], the distributions they came from}}

    The base, peft's adapter and three others of different rank and targets, in one batch.
    """
    engine = start(ground, dtype=dtype, token_budget=512).engine
    engine.load_adapter("peft", ground.reference.adapter_folder, optimizer=False)
    engine.create_adapter("base", LoraSpec(RANK, seed=1))  # B is zero
    trained = ["base", "peft", *train_unlike(engine)]
    for name in trained[1:]:
        engine.snapshot(name, name)
    asked = [
        ask(
            prompt,
            None if name == "base" else name,
            num_samples=NUM_SAMPLES,
            max_tokens=tokens,
            topk_sample_logprobs=VOCAB,
            seed=seed,
        )
        for name in trained
        for seed, (prompt, tokens) in enumerate(zip(prompts(), MAX_TOKENS, strict=True))
    ]
    results = iter(engine.sample(asked))
    outcome: Outcome = {}
    for name in trained:
        sequences = [(prompt, sequence) for prompt in prompts() for sequence in next(results).sequences]
        outcome[name] = {
            "tokens": [np.concatenate([prompt, sequence.tokens]) for prompt, sequence in sequences],
            "starts": [len(prompt) for prompt, _ in sequences],
            "logprobs": [sequence.logprobs for _, sequence in sequences],
            "sampled": [_distributions(sequence) for _, sequence in sequences],
        }
        outcome[name]["trained"] = _trained(engine, name, outcome[name]["tokens"], outcome[name]["starts"])
    return outcome


def _distributions(sequence: SampledSequence) -> np.ndarray:
    assert sequence.topk is not None
    found = np.full(sequence.topk.logprobs.shape, np.nan, dtype=np.float32)
    np.put_along_axis(found, sequence.topk.token_ids.astype(np.int64), sequence.topk.logprobs, axis=1)
    return found


def _trained(engine: Engine, name: str, sequences: list[np.ndarray], starts: list[int]) -> list[np.ndarray]:
    """By a pass with gradients, every token of the vocabulary a target of every place."""
    data = []
    for tokens in sequences:
        targets = np.tile(np.arange(VOCAB), (len(tokens) - 1, 1))
        data.append(Datum(tokens[:-1], {"target_tokens": targets, "weights": np.ones(targets.shape, np.float32)}))
    logprobs = engine.run_pass(name, data, cross_entropy, backward=True).logprobs
    return [found[start - 1 :] for found, start in zip(logprobs, starts, strict=True)]
