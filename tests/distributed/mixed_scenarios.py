"""Eight adapters of different rank and targets in one packed batch, beside each by itself. What the ranks run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jobs import Ground
from parity_reference import VOCAB
from parity_scenarios import Bench, cross_entropy, start

from megatron_adapters.engine import AdamParams, Datum, LoraSpec, Pass, SampleRequest
from megatron_adapters.frozen_linear import frozen_linear_grad, frozen_product
from megatron_adapters.row_products import FEWEST_ROWS, linear

Outcome = dict[str, Any]

SPECS: dict[str, LoraSpec] = {
    "rank-1": LoraSpec(1, seed=1),
    "rank-8": LoraSpec(8, seed=2),
    "rank-32": LoraSpec(32, seed=3),
    "rank-64": LoraSpec(64, seed=4),
    "mlp": LoraSpec(8, seed=5, train_attn=False, train_unembed=False),
    "attention": LoraSpec(32, seed=6, train_mlp=False, train_unembed=False),
    "unembedding": LoraSpec(1, seed=7, train_mlp=False, train_attn=False),
    "again-rank-8": LoraSpec(8, seed=8, train_unembed=False, per_expert=True),
}
STEPS = 3
FEW = ("rank-1", "rank-64", "attention", "again-rank-8")
"""extremes of rank, one without experts, one whose experts have matrices of their own"""


def data_for(name: str, seed: int = 0) -> list[Datum]:
    """Three sequences of the adapter's own; lengths depend on the name, contents on the seed too."""
    place = list(SPECS).index(name)
    random = np.random.default_rng(100 * place + seed)
    data = []
    for length in (5 + place, 11, 17 - place):
        ids = random.integers(3, VOCAB, length + 1)
        weights = random.random(length, dtype=np.float32)
        data.append(Datum(ids[:-1].astype(np.int32), {"target_tokens": ids[1:].astype(np.int64), "weights": weights}))
    return data


def raises(logprobs_T: Any, inputs: Any, segment_ids_T: Any) -> Any:
    raise ValueError("this loss fails")


def infinite(logprobs_T: Any, inputs: Any, segment_ids_T: Any) -> Any:
    return logprobs_T.sum() * float("inf")


def rows_are_alike() -> bool:
    """Whether this machine's products keep what row_products.py is there for: with FEWEST_ROWS and more, a row has the
    same bits whatever rows are beside it. MKL's AVX2 kernels do not.
    """
    most = 3 * FEWEST_ROWS
    for inputs, outputs in itertools.product((8, 64, 96, 128), repeat=2):
        x, weight = torch.randn(most, inputs), torch.randn(outputs, inputs)
        for product in (frozen_product, lambda x, w: frozen_linear_grad(x, w.t().contiguous()), linear):
            whole = product(x, weight)
            if not all(torch.equal(product(x[:n], weight), whole[:n]) for n in range(FEWEST_ROWS, most)):
                return False
    return True


def with_experts(ground: Ground) -> Outcome:
    """What experts and stages could spoil: training and sampling, together and alone, of a few of the adapters."""
    bench = start(ground, token_budget=64)
    return {
        "rows_are_alike": rows_are_alike(),
        "alone": training(bench, together=False, names=FEW, steps=2),
        "together": training(bench, together=True, names=FEW, steps=2),
        "samples": samples(bench, names=FEW, max_tokens=4),
    }


def run(ground: Ground) -> Outcome:
    """Everything."""
    bench = start(ground, token_budget=64)  # several micro-batches, adapters cut across them
    engine = bench.engine
    outcome = {
        "rows_are_alike": rows_are_alike(),
        "alone": training(bench, together=False),
        "together": training(bench, together=True),
        "composition": same_composition(bench),
        "failures": failures(bench),
        "two_passes": two_passes(bench),
        "samples": samples(bench),
        "targets": many_targets(bench),
    }
    # No adapter stays in memory but the one at work: the rest waits on the disk between any two calls.
    engine.room.most_bytes = 0
    outcome["put_away"] = training(bench, together=False)
    return outcome


def training(
    bench: Bench, *, together: bool, names: Sequence[str] = tuple(SPECS), steps: int = STEPS
) -> dict[str, Outcome]:
    """By adapter: losses, logprobs, gradients of the first pass, norms, weights after a few steps."""
    engine = bench.engine
    for name in names:
        engine.create_adapter(name, SPECS[name])
        wake(bench, name)
    found: dict[str, Outcome] = {name: {"losses": [], "norms": []} for name in names}
    for step in range(steps):
        passes = [Pass(name, data_for(name, step), cross_entropy) for name in names]
        outputs = (
            engine.run_passes(passes, backward=True)
            if together
            else [engine.run_pass(p.adapter_id, p.data, p.loss_fn, backward=True) for p in passes]
        )
        for name, output in zip(names, outputs, strict=True):
            assert not isinstance(output, Exception), output
            found[name]["losses"].append(output.loss_sum)
            if step == 0:
                found[name] |= {"logprobs": output.logprobs, "grads": bench.grads(name)}
            # Different learning rates, so that each has an optimizer of its own or this shows.
            adam = AdamParams(learning_rate=1e-3 * (1 + list(SPECS).index(name)), grad_clip_norm=1.0)
            found[name]["norms"].append(engine.optim_step(name, adam)["grad_norm:mean"])
    found_away = [engine.room.is_away(name) for name in names]
    for name in names:
        found[name] |= {"weights": bench.weights(name), "steps": engine.adapters[name].step, "away": found_away}
    for name in names:
        engine.drop_adapter(name)
    return found


def wake(bench: Bench, name: str) -> None:
    """Random B in place of zeros, the same whatever the layout: at zero, A has no gradient. Below rank 8 it is smaller,
    so that alpha / rank does not make the update many times the base's own output.
    """
    adapter = bench.engine._adapter(name)
    size = 0.05 * min(1.0, adapter.lora.rank / 8)
    with torch.no_grad():
        for shard in adapter.shards:
            if shard.key.endswith("lora_B.weight"):
                generator = torch.Generator().manual_seed(len(shard.key))
                full = torch.randn(shard.full_shape, generator=generator) * size
                part = full[shard.slice_of(adapter.place)]
                shard.view(adapter.weights).copy_(part)


def same_composition(bench: Bench) -> Outcome:
    """One adapter beside others of the same lengths, but with other contents, other weights and another loss."""
    engine = bench.engine
    seen = []
    for variant in range(2):
        for place, (name, spec) in enumerate(SPECS.items()):
            seed = spec.seed if place == 1 else spec.seed + 50 * variant
            engine.create_adapter(name, LoraSpec(spec.rank, seed, spec.train_mlp, spec.train_attn, spec.train_unembed))
            if place == 1 or variant:
                wake(bench, name)
        passes = [
            Pass(name, data_for(name, 0 if place == 1 else variant), cross_entropy) for place, name in enumerate(SPECS)
        ]
        output = engine.run_passes(passes, backward=True)[1]
        assert not isinstance(output, Exception), output
        seen.append({"loss": output.loss_sum, "logprobs": output.logprobs, "grads": bench.grads("rank-8")})
        for name in SPECS:
            engine.drop_adapter(name)
    return {"first": seen[0], "second": seen[1]}


def failures(bench: Bench) -> Outcome:
    """Passes that fail beside passes that do not, against the others without them, to the bit."""
    engine = bench.engine
    good = ["rank-1", "rank-32", "mlp"]
    for name, spec in SPECS.items():
        engine.create_adapter(name, spec)
        wake(bench, name)
        engine.run_pass(name, data_for(name, 9), cross_entropy, backward=True)  # gradients that must survive
    before = {name: bench.grads(name) for name in SPECS}
    passes = [Pass(name, data_for(name), cross_entropy) for name in good]
    bad_data = [Datum(np.array([3], np.int32), {"target_tokens": np.array([10**6]), "weights": np.ones(1, np.float32)})]
    mixed = [
        Pass("rank-8", data_for("rank-8"), raises),
        passes[0],
        Pass("rank-64", data_for("rank-64"), infinite),
        passes[1],
        Pass("attention", bad_data, cross_entropy),
        Pass("nobody", data_for("mlp"), cross_entropy),
        passes[2],
        Pass("mlp", data_for("rank-8"), raises),  # of an adapter whose other pass succeeds
    ]
    outputs = engine.run_passes(mixed, backward=True)
    after = {name: bench.grads(name) for name in SPECS}
    for name in good:  # the same from the same start, without the failing ones
        engine.drop_adapter(name)
        engine.create_adapter(name, SPECS[name])
        wake(bench, name)
        engine.run_pass(name, data_for(name, 9), cross_entropy, backward=True)
    clean = engine.run_passes(passes, backward=True)
    expected = {name: bench.grads(name) for name in good}
    for name in SPECS:
        engine.drop_adapter(name)
    losses = [output.loss_sum for output in clean if not isinstance(output, Exception)]
    return {
        "kinds": [type(output).__name__ for output in outputs],
        "messages": [str(output) for output in outputs if isinstance(output, Exception)],
        "losses": [output.loss_sum for output in outputs if not isinstance(output, Exception)],
        "clean_losses": losses,
        "before": before,
        "after": after,
        "expected": expected,
    }


def two_passes(bench: Bench) -> Outcome:
    """Two passes of one adapter in a group: their gradients add up, each has its own results."""
    engine = bench.engine
    for name in ("grouped", "apart"):
        engine.create_adapter(name, SPECS["rank-8"])
        wake(bench, name)
    data = [data_for("rank-8", 1), data_for("rank-8", 2)]
    grouped = engine.run_passes([Pass("grouped", d, cross_entropy) for d in data], backward=True)
    apart = [engine.run_pass("apart", d, cross_entropy, backward=True) for d in data]
    found = {
        "grouped": [output.loss_sum for output in grouped if not isinstance(output, Exception)],
        "apart": [output.loss_sum for output in apart],
        "grads": [bench.grads("grouped"), bench.grads("apart")],
    }
    for name in ("grouped", "apart"):
        engine.drop_adapter(name)
    return found


def samples(bench: Bench, names: Sequence[str] = tuple(SPECS), max_tokens: int = 8) -> Outcome:
    """Tokens and logprobs of every adapter's samples, beside the others' and alone."""
    engine = bench.engine
    for name in names:
        engine.create_adapter(name, SPECS[name])
        wake(bench, name)
        engine.snapshot(name, name)
    prompt = np.arange(3, 12, dtype=np.int32)
    requests = [SampleRequest(name, prompt + place, 2, max_tokens, seed=place) for place, name in enumerate(names)]
    together = [[(s.tokens, s.logprobs) for s in result.sequences] for result in engine.sample(requests)]
    alone = [[(s.tokens, s.logprobs) for s in engine.sample([request])[0].sequences] for request in requests]
    for name in names:
        engine.drop_adapter(name)
        engine.drop_snapshot(name)
    return {"names": list(names), "together": together, "alone": alone}


def many_targets(bench: Bench) -> Outcome:
    """One pass with three targets a token between two with one."""
    engine = bench.engine
    names = ["rank-1", "rank-8", "rank-32"]
    passes = []
    for name in names:
        engine.create_adapter(name, SPECS[name])
        wake(bench, name)
        data = data_for(name)
        if name == "rank-8":
            data = [
                Datum(
                    d.tokens,
                    {key: np.repeat(values[:, None], 3, axis=1) for key, values in d.inputs.items()},
                )
                for d in data
            ]
        passes.append(Pass(name, data, cross_entropy))
    together = [output for output in engine.run_passes(passes, backward=False) if not isinstance(output, Exception)]
    alone = [engine.run_pass(p.adapter_id, p.data, p.loss_fn, backward=False) for p in passes]
    for name in names:
        engine.drop_adapter(name)
    return {"together": [o.logprobs for o in together], "alone": [o.logprobs for o in alone]}
