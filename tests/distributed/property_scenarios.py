"""Promises about training, tried out by the ranks; the assertions are in test_properties.py, one test a promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import custom_losses
import numpy as np
import torch
from jobs import Ground
from parity_reference import ADAM, RANK
from parity_scenarios import Bench, Outcome, batch, cross_entropy, start, train_unlike, without_weight
from torch import Tensor

from megatron_adapters.engine import AdamParams, Datum, Engine, Layout, LoraSpec
from tinker_hpc import custom_loss
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.worker.custom_loss import CustomLossFn, numbered


def run_all(ground: Ground) -> Outcome:
    """Every promise, one after the other on one engine that runs qwen3."""
    bench = start(ground)
    return {scenario.__name__: scenario(bench) for scenario in SCENARIOS}


def fresh_adapter_is_the_base(bench: Bench) -> Outcome:
    bench.engine.create_adapter("fresh", LoraSpec(RANK, seed=1))
    bench.engine.save_adapter("fresh", bench.folder / "fresh", optimizer=False)
    base, with_adapter = bench.logits_with(None), bench.logits_with(bench.engine.adapters["fresh"].lora)
    return {"base": base, "with_adapter": with_adapter, "weights": bench.weights("fresh")}


def two_passes_equal_one(bench: Bench) -> Outcome:
    engine, data = bench.engine, batch()
    for name in ("joined", "split"):
        engine.load_adapter(name, bench.references["qwen3"].adapter_folder, optimizer=False)
    engine.run_pass("joined", data, cross_entropy, backward=True)
    engine.run_pass("split", data[:1], cross_entropy, backward=True)  # fewer data than data-parallel ranks
    engine.run_pass("split", data[1:], cross_entropy, backward=True)
    return {"joined": bench.grads("joined"), "split": bench.grads("split")}


def zero_weight_is_no_op(bench: Bench) -> Outcome:
    engine = bench.engine
    results = {}
    for name in ("plain", "with_zeros"):
        engine.load_adapter(name, bench.references["qwen3"].adapter_folder, optimizer=False)
        for _ in range(2):
            engine.run_pass(name, batch(), cross_entropy, backward=True)
            if name == "with_zeros":
                engine.run_pass(name, without_weight(batch(8)), cross_entropy, backward=True)
            engine.optim_step(name, AdamParams(**ADAM))
        results[name] = bench.weights(name)
    return results


def order_is_kept(bench: Bench) -> Outcome:
    """Logprobs come back in the order given, however the data are split and packed."""
    engine, data = bench.engine, batch() + batch(9)
    engine.load_adapter("order", bench.references["qwen3"].adapter_folder, optimizer=False)
    together = engine.run_pass("order", data, cross_entropy, backward=False)
    alone = [engine.run_pass("order", [datum], cross_entropy, backward=False) for datum in data]
    return {
        "together": together.logprobs,
        "alone": [out.logprobs[0] for out in alone],
        "loss": together.loss_sum,
        "loss_alone": sum(out.loss_sum for out in alone),
        "grad": float(engine.adapters["order"].grads.abs().max()),
    }


def several_targets(bench: Bench) -> Outcome:
    """Three weighted targets a token in one pass, and the same as three passes of one target each."""
    engine, random = bench.engine, np.random.default_rng(13)
    for name in ("soft", "one_by_one"):
        engine.load_adapter(name, bench.references["qwen3"].adapter_folder, optimizer=False)
    drawn = [
        (random.integers(0, 128, (len(d.tokens), 3)), random.normal(size=(len(d.tokens), 3)).astype(np.float32))
        for d in batch()
    ]

    def with_targets(columns: Any) -> list[Datum]:
        return [
            replace(d, inputs={"target_tokens": targets[:, columns], "weights": weights[:, columns]})
            for d, (targets, weights) in zip(batch(), drawn, strict=True)
        ]

    soft = engine.run_pass("soft", with_targets(slice(None)), cross_entropy, backward=True)
    alone = [engine.run_pass("one_by_one", with_targets(k), cross_entropy, backward=True) for k in range(3)]
    return {
        "targets": [targets for targets, _ in drawn],
        "logprobs": soft.logprobs,
        "loss": soft.loss_sum,
        "loss_alone": sum(out.loss_sum for out in alone),
        "soft": bench.grads("soft"),
        "one_by_one": bench.grads("one_by_one"),
    }


def uploaded_loss(bench: Bench) -> Outcome:
    """An uploaded loss over data that micro-batches and ranks have cut up, beside the same loss by hand."""
    engine = bench.engine
    loss = custom_loss.read(custom_losses.payload(custom_losses.handle("focal")))
    uploaded = CustomLossFn(loss, [[torch.from_numpy(d.inputs["weights"])] for d in batch()])

    def by_hand(logprobs_T: Tensor, inputs_T: Any, segment_ids_T: Tensor) -> Tensor:
        count_T = torch.bincount(segment_ids_T)[segment_ids_T]
        return -((1 - logprobs_T.exp()) ** 2 * logprobs_T * inputs_T["weights"] / count_T.sqrt()).sum()

    results = {}
    for name, data, loss_fn in (("uploaded", numbered(batch()), uploaded), ("by_hand", batch(), by_hand)):
        engine.load_adapter(name, bench.references["qwen3"].adapter_folder, optimizer=False)
        output = engine.run_pass(name, data, loss_fn, backward=True)
        results[name] = {"loss": output.loss_sum, "grads": bench.grads(name)}
    expected = np.mean([np.exp(row).mean() for row in output.logprobs])
    return {**results, "metrics": uploaded.metrics(output.logprobs), "expected_p": float(expected)}


def save_load_step(bench: Bench) -> Outcome:
    engine, folder = bench.engine, bench.folder / "state"
    engine.create_adapter("kept", LoraSpec(RANK, seed=5))
    for _ in range(3):
        engine.run_pass("kept", batch(), cross_entropy, backward=True)
        engine.optim_step("kept", AdamParams(**ADAM))
    engine.save_adapter("kept", folder, optimizer=True)
    engine.load_adapter("loaded", folder, optimizer=True)
    steps = engine.adapters["loaded"].step
    for name in ("kept", "loaded"):
        engine.run_pass(name, batch(), cross_entropy, backward=True)
        engine.optim_step(name, AdamParams(**ADAM))
    return {"kept": bench.weights("kept"), "loaded": bench.weights("loaded"), "steps": steps, "folder": folder}


def resume(ground: Ground) -> dict[str, Tensor]:
    """One more step on a state that another layout saved (the step save_load_step takes there)."""
    bench = start(ground)
    bench.engine.load_adapter("foreign", ground.given["save_load_step"]["folder"], optimizer=True)
    bench.engine.run_pass("foreign", batch(), cross_entropy, backward=True)
    bench.engine.optim_step("foreign", AdamParams(**ADAM))
    return bench.weights("foreign")


def adapters_are_separate(bench: Bench) -> Outcome:
    """Training one adapter never moves another, and both give the same numbers alone and beside each other."""
    engine = bench.engine
    engine.create_adapter("bystander", LoraSpec(4, seed=2, train_mlp=False))
    before = bench.weights("bystander")
    engine.run_pass("bystander", batch(), cross_entropy, backward=True)
    grads_before = bench.grads("bystander")
    alone = _trained(bench, "alone")
    engine.create_adapter("beside", LoraSpec(RANK, seed=3))
    for _ in range(2):
        engine.run_pass("beside", batch(), cross_entropy, backward=True)
        engine.run_pass("bystander", without_weight(batch()), cross_entropy, backward=True)
        engine.optim_step("beside", AdamParams(**ADAM))
    return {
        "before": before,
        "after": bench.weights("bystander"),
        "grads_before": grads_before,
        "grads_after": bench.grads("bystander"),
        "alone": alone,
        "beside": bench.weights("beside"),
    }


def mixed_batch(bench: Bench) -> Outcome:
    """Adapters of different rank and target set, and the bare base, in one forward."""
    engine = bench.engine
    train_unlike(engine)
    loras = [engine.adapters["mix1"].lora, None, engine.adapters["mix2"].lora, engine.adapters["mix3"].lora]
    mixed = bench.logits([(lora, 0) for lora in loras])
    separate = [bench.logits_with(lora)[index] for index, lora in enumerate(loras)]
    snapshot = engine.adapters["mix1"].lora.snapshot(engine.runtime.dtype)
    mixed_snapshot = bench.logits([(snapshot, 0), *((lora, 0) for lora in loras[1:])])
    return {"mixed": mixed, "separate": separate, "with_snapshot": mixed_snapshot}


def failed_pass_adds_nothing(bench: Bench) -> Outcome:
    """A loss that raises, on some data-parallel ranks only, or is NaN: the gradients stay as they were."""
    engine = bench.engine
    engine.load_adapter("whole", bench.references["qwen3"].adapter_folder, optimizer=False)

    def broken(logprobs_T: Tensor, inputs_T: Any, segment_ids_T: Tensor) -> Tensor:
        if bool((inputs_T["weights"] == 5.0).any()):
            raise KeyError("no such input")
        return cross_entropy(logprobs_T, inputs_T, segment_ids_T)

    data = batch()
    marked = replace(data[1], inputs={**data[1].inputs, "weights": np.full(9, 5.0, np.float32)})
    nan = replace(data[1], inputs={**data[1].inputs, "weights": np.full(9, np.nan, np.float32)})
    result: Outcome = {"raised": [], "unchanged": []}
    for passes in range(2):  # without and with gradients of an earlier pass
        before = engine.adapters["whole"].grads.clone()
        for bad in (marked, nan):
            try:
                engine.run_pass("whole", [data[0], bad, *data[2:]], broken, backward=True)
            except (KeyError, TinkerHpcError) as error:
                result["raised"].append(type(error).__name__)
            result["unchanged"].append(torch.equal(before, engine.adapters["whole"].grads))
        engine.run_pass("whole", data, cross_entropy, backward=True)
        assert engine.adapters["whole"].has_gradients, passes
    return result


def bad_requests(bench: Bench) -> dict[str, str]:
    """Every bad request raises on every rank, says what to change, and leaves the engine usable."""
    engine = bench.engine
    engine.create_adapter("ok", LoraSpec(RANK, seed=1))
    before = engine.adapters["ok"].weights.clone()
    datum = batch()[0]
    blocker = bench.folder / "a_file"
    if engine.global_rank == 0:
        blocker.write_text("")

    def with_inputs(**changes: Any) -> list[Datum]:
        return [replace(datum, inputs={**datum.inputs, **changes})]

    def nan_step() -> None:
        def steep(logprobs_T: Tensor, inputs_T: Any, segment_ids_T: Tensor) -> Tensor:
            return (logprobs_T * 0.0).sum().sqrt()  # value 0, derivative infinity * 0

        engine.run_pass("ok", batch(), steep, backward=True)
        engine.optim_step("ok", AdamParams())

    attempts: dict[str, Callable[[], Any]] = {
        "rank 0": lambda: engine.create_adapter("x", LoraSpec(0, seed=1)),
        "nothing trained": lambda: engine.create_adapter(
            "x", LoraSpec(4, seed=1, train_mlp=False, train_attn=False, train_unembed=False)
        ),
        "taken id": lambda: engine.create_adapter("ok", LoraSpec(4, seed=1)),
        "unknown adapter": lambda: engine.optim_step("nobody", AdamParams()),
        "unknown snapshot": lambda: engine.drop_snapshot("nobody"),
        "no data": lambda: engine.run_pass("ok", [], cross_entropy, backward=True),
        "no tokens": lambda: engine.run_pass("ok", [Datum(np.zeros(0, np.int32), {})], cross_entropy, backward=True),
        "no targets": lambda: engine.run_pass(
            "ok", [replace(datum, inputs={"weights": datum.inputs["weights"]})], cross_entropy, backward=True
        ),
        "keys differ": lambda: engine.run_pass(
            "ok",
            [datum, replace(datum, inputs={"target_tokens": datum.inputs["target_tokens"]})],
            cross_entropy,
            backward=True,
        ),
        "short weights": lambda: engine.run_pass(
            "ok", with_inputs(weights=np.ones(3, np.float32)), cross_entropy, backward=True
        ),
        "targets that differ in number": lambda: engine.run_pass(
            "ok",
            [datum, *with_inputs(target_tokens=np.zeros((17, 2), np.int64), weights=np.ones((17, 2), np.float32))],
            cross_entropy,
            backward=True,
        ),
        "token beyond vocabulary": lambda: engine.run_pass(
            "ok", [replace(datum, tokens=datum.tokens + 128)], cross_entropy, backward=True
        ),
        "negative target": lambda: engine.run_pass(
            "ok", with_inputs(target_tokens=datum.inputs["target_tokens"] - 200), cross_entropy, backward=True
        ),
        "over the context": lambda: engine.run_pass(
            "ok",
            [Datum(np.zeros(513, np.int32), {"target_tokens": np.zeros(513, np.int64)})],
            cross_entropy,
            backward=True,
        ),
        "nan weights": lambda: engine.run_pass(
            "ok", with_inputs(weights=np.full(17, np.nan, np.float32)), cross_entropy, backward=True
        ),
        "nan gradient": nan_step,
        "missing folder": lambda: engine.load_adapter("ok", bench.folder / "nowhere", optimizer=True),
        "no optimizer state": lambda: engine.load_adapter(
            "ok", bench.references["qwen3"].adapter_folder, optimizer=True
        ),
        "another model's adapter": lambda: engine.load_adapter(
            "ok", bench.references["qwen2"].adapter_folder, optimizer=False
        ),
        "folder is a file": lambda: engine.save_adapter("ok", blocker / "sub", optimizer=True),
        "layout does not fit": lambda: Engine.start(bench.references["qwen3"].model_folder, Layout(tp_size=3)),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (TinkerHpcError, OSError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
        else:
            messages[name] = "accepted"
    assert torch.equal(before, engine.adapters["ok"].weights)
    messages["afterwards"] = str(engine.run_pass("ok", [datum], cross_entropy, backward=True).loss_sum)
    return messages


def _trained(bench: Bench, name: str) -> dict[str, Tensor]:
    engine = bench.engine
    engine.create_adapter(name, LoraSpec(RANK, seed=3))
    for _ in range(2):
        engine.run_pass(name, batch(), cross_entropy, backward=True)
        engine.optim_step(name, AdamParams(**ADAM))
    return bench.weights(name)


SCENARIOS = (
    fresh_adapter_is_the_base,
    two_passes_equal_one,
    zero_weight_is_no_op,
    order_is_kept,
    several_targets,
    uploaded_loss,
    save_load_step,
    adapters_are_separate,
    mixed_batch,
    failed_pass_adds_nothing,
    bad_requests,
)
