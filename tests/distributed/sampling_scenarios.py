"""What the ranks sample, all of it in one process start per layout; the assertions are in test_sampling.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jobs import Ground
from parity_reference import RANK, VOCAB
from parity_scenarios import batch, cross_entropy, train_unlike

from megatron_adapters.engine import AdamParams, Datum, Engine, LoraSpec, SampleRequest, SampleResult
from megatron_adapters.sample_request import PromptTargets

Outcome = dict[str, Any]

PROMPT_LENGTHS = (1, 5, 40, 17, 64)
NEW_TOKENS = 16


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(0, VOCAB, length, dtype=np.int32) for length in PROMPT_LENGTHS]


def ask(prompt: np.ndarray, snapshot_id: str | None, **changes: Any) -> SampleRequest:
    return SampleRequest(snapshot_id, prompt, **{"max_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 1, **changes})


def family(ground: Ground) -> Outcome:
    """What every family is asked."""
    engine = _start(ground)
    return {"greedy": greedy(engine), "logprobs": logprobs(engine)}


def all_scenarios(ground: Ground) -> Outcome:
    """What one family is asked for all."""
    engine = _start(ground)
    return {scenario.__name__: scenario(engine) for scenario in SCENARIOS}


def _start(ground: Ground) -> Engine:
    engine = Engine.start(ground.reference.model_folder, ground.layout)
    engine.load_adapter("peft", ground.reference.adapter_folder, optimizer=False)
    engine.load_snapshot("peft", ground.reference.adapter_folder)
    return engine


def snapshot_memory(ground: Ground) -> Outcome:
    """What a snapshot takes once it was sampled from, and how many of three are too many where one rank is short."""
    engine = _start(ground)
    greedy(engine)
    num_bytes = engine.snapshots["peft"].num_bytes
    names = ["peft", "second", "third"]
    for name in names[1:]:
        engine.snapshot("peft", name)
    in_excess = {"by default": engine.snapshots_in_excess(names)}
    last = engine.global_rank == engine.world_size - 1
    for what, most_bytes in {"all": 0, "one": num_bytes + 2 * engine.snapshots["third"].num_bytes - 1}.items():
        engine._most_snapshot_bytes = most_bytes if last else 2**40
        in_excess[what] = engine.snapshots_in_excess(names)
    return {"num_bytes": num_bytes, "in_excess": in_excess}


def greedy(engine: Engine) -> dict[str | None, list[SampleResult]]:
    """Base and adapter in one batch."""
    requests = [ask(prompt, weights, temperature=0.0) for prompt in prompts() for weights in (None, "peft")]
    results = engine.sample(requests)
    return {None: results[0::2], "peft": results[1::2]}


def logprobs(engine: Engine) -> Outcome:
    """Sampled tokens and prompts, scored by the sampler and by the trainer."""
    results = engine.sample([ask(prompt, "peft", num_samples=3, prompt_logprobs=True) for prompt in prompts()])
    whole = [
        np.concatenate([prompt, sequence.tokens])
        for prompt, result in zip(prompts(), results, strict=True)
        for sequence in result.sequences
    ]
    data = [
        Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(len(tokens) - 1, "f4")})
        for tokens in whole
    ]
    # With gradients: without, the trainer would run the sampler's layers.
    trained = engine.run_pass("peft", data, cross_entropy, backward=True).logprobs
    return {"results": results, "training_logprobs": trained}


def seeds(engine: Engine) -> Outcome:
    """The same request alone, among others, and with another seed."""
    one = ask(prompts()[2], "peft", num_samples=4, seed=77)
    others = [ask(prompt, None, num_samples=3, max_tokens=9, seed=5) for prompt in prompts()]
    crowd = engine.sample([*others[:2], one, *others[2:]])
    return {
        "alone": engine.sample([one])[0],
        "crowd": crowd[2],
        "other_seed": engine.sample([ask(prompts()[2], "peft", num_samples=4, seed=78)])[0],
    }


def mixed_weights(engine: Engine) -> Outcome:
    """Three adapters of different rank and targets and the bare base, in one batch and one at a time."""
    for name in train_unlike(engine):
        engine.snapshot(name, name)
    weights = ["mix3", None, "mix1", "mix2", None, "mix1"]
    requests = [ask(prompts()[1], name, seed=seed, max_tokens=6) for seed, name in enumerate(weights)]
    return {"together": engine.sample(requests), "alone": [engine.sample([request])[0] for request in requests]}


def snapshots_are_immutable(engine: Engine) -> Outcome:
    def few(snapshot_id: str) -> SampleRequest:
        return ask(prompts()[1], snapshot_id, max_tokens=6)

    engine.create_adapter("moving", LoraSpec(RANK, seed=9))
    results = []
    for name in ("early", "late"):
        engine.run_pass("moving", batch(), cross_entropy, backward=True)
        engine.optim_step("moving", AdamParams(learning_rate=0.05))
        engine.snapshot("moving", name)
        results.append(engine.sample([few("early")])[0])
    [late] = engine.sample([few("late")])
    engine.drop_adapter("moving")
    [kept] = engine.sample([few("early")])
    engine.drop_snapshot("early")
    [dropped] = engine.sample([few("early")])
    return {"before": results[0], "after": results[1], "late": late, "kept": kept, "dropped": dropped}


def arrivals(engine: Engine) -> Outcome:
    """Requests that come while others run, more than fit into one prefill; every rank sees the same answers."""
    waiting: list[Sequence[SampleRequest]] = [[], [ask(prompts()[3], "peft", seed=4)], [], [ask(prompts()[0], None)]]
    answers: dict[int, SampleResult] = {}
    engine.sample(
        [ask(prompts()[2], "peft", num_samples=5, max_tokens=12), ask(np.array([VOCAB], dtype=np.int32), None)],
        on_finished=answers.__setitem__,
        admit=lambda: waiting.pop(0) if waiting else [],
    )
    alone = engine.sample([ask(prompts()[3], "peft", seed=4)])
    results = [answers[index] for index in sorted(answers)]
    return {"results": results, "finished": list(answers), "alone": alone[0]}


def distributions(engine: Engine) -> list[SampleResult]:
    """All that can be asked beside the tokens, of prompts of one, some and many tokens."""
    requests = []
    for seed, prompt in enumerate(prompts()):
        rows = np.arange(len(prompt) - 1)
        asks = {
            "prompt_logprobs": True,
            "topk_prompt_logprobs": 4,
            "topk_sample_logprobs": 2,
            "prompt_alt_tokens_k": 3,
            "target_prompt_logprobs": PromptTargets(rows, (rows * 7) % VOCAB),
        }
        requests.append(ask(prompt, "peft", seed=seed, num_samples=2, max_tokens=3, temperature=0.8, **asks))
    return engine.sample(requests)


SCENARIOS = (seeds, mixed_weights, snapshots_are_immutable, arrivals, distributions)
