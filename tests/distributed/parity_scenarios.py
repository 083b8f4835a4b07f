"""Parity: what the ranks compute of what transformers + peft compute. The assertions are in test_parity.py.

Every scenario returns plain numbers and tensors, on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import Ground
from parity_reference import ADAM, RANK, STEPS, Reference, sequences
from torch import Tensor

from megatron_adapters import adapter_files
from megatron_adapters.engine import AdamParams, Datum, Engine, LoraSpec
from megatron_adapters.grad_sync import sum_gradients
from megatron_adapters.lora_linear import Segment

Outcome = dict[str, Any]


def cross_entropy(logprobs_T: Tensor, inputs_T: Any, segment_ids_T: Tensor) -> Tensor:
    return -(logprobs_T * inputs_T["weights"]).sum()


def batch(seed: int = 7) -> list[Datum]:
    return [Datum(s.tokens, {"target_tokens": s.targets, "weights": s.weights}) for s in sequences(seed)]


def without_weight(data: list[Datum]) -> list[Datum]:
    return [replace(d, inputs={**d.inputs, "weights": np.zeros_like(d.inputs["weights"])}) for d in data]


def train_unlike(engine: Engine) -> list[str]:
    """Three adapters of different rank and target set, each trained by a step. Returns their names."""
    specs = {
        "mix1": LoraSpec(RANK, seed=21),
        "mix2": LoraSpec(3, seed=22, train_attn=False),
        "mix3": LoraSpec(16, seed=23, train_unembed=False, train_mlp=False),
    }
    for name, spec in specs.items():
        engine.create_adapter(name, spec)
        engine.run_pass(name, batch(), cross_entropy, backward=True)
        engine.optim_step(name, AdamParams(learning_rate=0.05))
    return list(specs)


@dataclass
class Bench:
    """An engine, and a folder for what a scenario writes."""

    engine: Engine
    folder: Path
    references: Mapping[str, Reference] = field(default_factory=dict)

    def grads(self, adapter_id: str) -> dict[str, Tensor]:
        """Canonical gradients, complete over TP and DP, without disturbing the accumulated ones."""
        adapter = self.engine._adapter(adapter_id)
        kept = adapter.grads.clone()
        sum_gradients(adapter, self.engine.runtime)
        full = adapter_files.gather(adapter.lora, adapter.grads, self.engine.runtime, self.engine.model.arch)
        adapter.grads.copy_(kept)
        return full

    def weights(self, adapter_id: str) -> dict[str, Tensor]:
        adapter = self.engine._adapter(adapter_id)
        return adapter_files.gather(adapter.lora, adapter.weights, self.engine.runtime, self.engine.model.arch)

    def logits(self, segments: list[tuple[Any, int]], data: list[Datum] | None = None) -> list[Tensor]:
        """Logits of every sequence; segments gives the adapter weights of each of them."""
        data = data or batch()
        model = self.engine.model
        lengths = [len(d.tokens) for d in data]
        padding = model.padded_length(sum(lengths)) - sum(lengths)
        bounds = np.concatenate(([0], np.cumsum([*lengths, padding] if padding else lengths))).tolist()
        spans = list(pairwise(bounds))
        positions = torch.cat([torch.arange(end - start) for start, end in spans])
        tokens = torch.from_numpy(np.concatenate([*(d.tokens for d in data), np.zeros(padding)])).long()
        loras = [lora for lora, _ in segments] + [None] * (len(spans) - len(segments))
        routed = [Segment(lora, start, end) for lora, (start, end) in zip(loras, spans, strict=True)]
        with torch.no_grad():
            hidden = model.hidden_states(tokens, model.context(bounds, positions), routed)
            logits = model.head.logits(hidden, routed)
        return [logits[start:end] for start, end in spans[: len(data)]]

    def logits_with(self, lora: Any) -> list[Tensor]:
        return self.logits([(lora, 0)] * len(batch()))


def start(ground: Ground, **options: Any) -> Bench:
    """The family's model under the layout, with micro-batches so small that the common batch is several."""
    engine = Engine.start(ground.reference.model_folder, ground.layout, **{"token_budget": 40, **options})
    return Bench(engine, ground.folder, ground.references)


def parity(ground: Ground) -> Outcome:
    """Import PEFT's adapter; logits, gradients, five steps; export the result."""
    bench = start(ground)
    engine = bench.engine
    engine.load_adapter("a", ground.reference.adapter_folder, optimizer=False)
    logits = bench.logits_with(engine.adapters["a"].lora)
    base_logits = bench.logits_with(None)
    first = engine.run_pass("a", batch(), cross_entropy, backward=True)
    grads = bench.grads("a")
    losses, norms = [first.loss_sum], [engine.optim_step("a", AdamParams(**ADAM))["grad_norm:mean"]]
    for _ in range(STEPS - 1):
        losses.append(engine.run_pass("a", batch(), cross_entropy, backward=True).loss_sum)
        norms.append(engine.optim_step("a", AdamParams(**ADAM))["grad_norm:mean"])
    export = bench.folder / "export"
    engine.save_adapter("a", export, optimizer=False)
    return {
        "logits": logits,
        "base_logits": base_logits,
        "logprobs": first.logprobs,
        "grads": grads,
        "losses": losses,
        "norms": norms,
        "export": export,
        "exported_logits": bench.logits_with(engine.adapters["a"].lora),
    }
