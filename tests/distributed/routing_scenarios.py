"""Routing replay on ranks: sampled, then trained with the experts that were noted. See test_routing_replay.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jobs import Ground
from parity_reference import VOCAB
from parity_scenarios import Bench, batch, cross_entropy, start
from sampling_scenarios import ask

from megatron_adapters.engine import Datum, Engine
from megatron_adapters.interface import Choices
from megatron_adapters.moe import MoeMlp
from megatron_adapters.routing_replay import gather_noted

Outcome = dict[str, Any]

PROMPT_LENGTHS = (1, 40)
NEAR = 0.005


def both(ground: Ground) -> dict[str, Outcome]:
    return {
        "float32": _sampled_and_trained(ground, "float32"),
        "bfloat16": _sampled_and_trained(ground, "bfloat16"),
        "forced": _forced(ground),
    }


def near_ties(engine: Engine) -> None:
    """Routers whose experts all but tie, so that a rounding chooses."""
    for module in engine.model.gpt.modules():
        if isinstance(module, MoeMlp):
            weight_ED = module.router.weight.data
            mean_D = weight_ED.mean(0, keepdim=True)
            weight_ED.copy_(mean_D + NEAR * (weight_ED - mean_D))
            for bias in (module.router.bias, module.router.correction):
                if bias is not None:
                    bias.data.zero_()


def _sampled_and_trained(ground: Ground, dtype: str) -> Outcome:
    """Of each sequence: the experts noted while sampling ("recorded"), those of the trainer with and without replay
    ("replayed", "own"); logprobs of the sampled tokens, the sampler's and the trainer's; the trainer's gradients.
    """
    bench = start(ground, dtype=dtype, token_budget=512)
    engine = bench.engine
    if dtype == "bfloat16":
        near_ties(engine)
    engine.load_adapter("peft", ground.reference.adapter_folder, optimizer=False)
    engine.snapshot("peft", "peft")
    random = np.random.default_rng(3)
    prompts = [random.integers(0, VOCAB, length, dtype=np.int32) for length in PROMPT_LENGTHS]
    asked = [
        ask(prompt, "peft", num_samples=2, max_tokens=7 + 6 * seed, seed=seed, note_experts=True)
        for seed, prompt in enumerate(prompts)
    ]
    *noted, plain = engine.sample([*asked, ask(prompts[1], None, max_tokens=4)])
    assert plain.sequences[0].experts is None, "nobody asked for these"
    data, sampled = [], []
    for prompt, result in zip(prompts, noted, strict=True):
        for sequence in result.sequences:
            assert sequence.experts is not None
            tokens = np.concatenate([prompt, sequence.tokens])
            weights = (np.arange(1, len(tokens)) >= len(prompt)).astype(np.float32)
            inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": weights}
            experts = np.concatenate([sequence.experts.prompt, sequence.experts.sampled])
            data.append(Datum(tokens[:-1], inputs, experts))
            sampled.append(sequence.logprobs)
    outcome: Outcome = {"recorded": [datum.experts for datum in data], "sampled": sampled}
    for how, given in {"replayed": data, "own": [replace(datum, experts=None) for datum in data]}.items():
        outcome[how], outcome[f"{how} logprobs"], outcome[f"{how} grads"] = _trained(bench, given)
    return outcome


def _trained(bench: Bench, data: list[Datum]) -> tuple[list[Choices], list[np.ndarray], dict[str, torch.Tensor]]:
    """Data one by one: the experts they went through, logprobs of what was sampled, gradients of all."""
    engine = bench.engine
    chosen, logprobs = [], []
    for datum in data:
        with engine.model.routing.noting() as noted:
            output = engine.run_pass("peft", [datum], cross_entropy, backward=True)
        chosen.append(_whole(engine, noted, len(datum.tokens)))
        logprobs.append(output.logprobs[0][datum.inputs["weights"] > 0])
    grads = bench.grads("peft")
    engine.adapters["peft"].zero_grad()
    return chosen, logprobs, grads


def _whole(engine: Engine, noted: dict[int, torch.Tensor], length: int) -> Choices:
    """Of a single datum, which is the first data-parallel rank's; the others had padding alone."""
    model, runtime = engine.model, engine.runtime
    assert model.arch.experts is not None
    num_tokens = len(next(iter(noted.values()))) * runtime.layout.tp_size
    layers = len(model.arch.expert_layers)
    found = gather_noted(noted, num_tokens, num_layers=layers, experts=model.arch.experts, runtime=runtime)
    return found[:length]


def _forced(ground: Ground) -> Outcome:
    """The common batch in small micro-batches, one of them recomputed, through experts that no router would choose;
    the last datum as the routers choose.
    """
    bench = start(ground, token_budget=20)
    engine = bench.engine
    engine.load_adapter("peft", ground.reference.adapter_folder, optimizer=False)
    info, random = engine.info, np.random.default_rng(13)
    shape = (info.expert_layers, info.num_experts)
    data = []
    for datum in batch():
        order = random.permuted(np.tile(np.arange(info.num_experts), (len(datum.tokens), shape[0], 1)), axis=-1)
        data.append(replace(datum, experts=order[..., : info.experts_per_token].astype(np.uint8)))
    data[-1] = replace(data[-1], experts=None)
    output = engine.run_pass("peft", data, cross_entropy, backward=True)
    return {
        "experts": [datum.experts for datum in data],
        "logprobs": output.logprobs,
        "grads": bench.grads("peft"),
    }
