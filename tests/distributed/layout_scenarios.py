"""What the ranks of a layout do beyond parity: sample, hand on a state, recompute, join steps without data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sampling_scenarios
import torch
import torch.distributed as dist
from jobs import Ground
from parity_reference import ADAM, RANK, VOCAB
from parity_scenarios import Bench, Outcome, batch, cross_entropy, start
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_adapters.engine import AdamParams, Datum, Engine, LoraSpec, SampleRequest
from megatron_adapters.experts import StackedExperts
from megatron_adapters.links import Links

sys.path.append(str(Path(__file__).parents[1] / "models"))

import quantised_models

STEPS = 5
FP8_BLOCK = (8, 8)
"""transformers takes blocks that divide every matrix"""


def greedy(ground: Ground) -> Outcome:
    """Greedy tokens of base and adapter."""
    engine = start(ground).engine
    engine.load_snapshot("peft", ground.reference.adapter_folder)
    return sampling_scenarios.greedy(engine)


def mixed_experts(ground: Ground) -> Outcome:
    """Several adapters and the base in one batch and one at a time; and of an odd number of rows of each alone, what
    layers of experts were told on any rank: how many weights there are, and whether rows are numbered by them.
    """
    engine = start(ground).engine
    outcome = sampling_scenarios.mixed_weights(engine)
    told: set[tuple[int, bool]] = set()
    for module in engine.model.gpt.modules():
        if isinstance(module, StackedExperts):
            module.register_forward_pre_hook(lambda _, inputs: told.add((len(inputs[2]), inputs[3] is not None)))
    outcome["told"] = {}
    for name in (None, *engine.snapshots):
        told.clear()
        engine.sample([sampling_scenarios.ask(sampling_scenarios.prompts()[1], name, num_samples=3, max_tokens=4)])
        everyones: list[set[tuple[int, bool]]] = [set() for _ in range(engine.world_size)]
        dist.all_gather_object(everyones, told, group=engine.control_group)
        outcome["told"][name] = set().union(*everyones)
    return outcome


def state(ground: Ground) -> Outcome:
    """A few steps, a state, and the losses of the steps after it."""
    engine = start(ground).engine
    engine.load_adapter("a", ground.reference.adapter_folder, optimizer=False)
    _losses(engine, "a")
    folder = ground.folder / "state"
    engine.save_adapter("a", folder, optimizer=True)
    return {"folder": folder, "next_losses": _losses(engine, "a")}


def next_losses(ground: Ground) -> list[float]:
    """The same steps on the state that another layout saved."""
    engine = start(ground).engine
    folder: Path = ground.given["folder"]
    engine.load_adapter("next", folder, optimizer=True)
    return _losses(engine, "next")


def _losses(engine: Engine, adapter_id: str) -> list[float]:
    losses = []
    for _ in range(STEPS):
        losses.append(engine.run_pass(adapter_id, batch(), cross_entropy, backward=True).loss_sum)
        engine.optim_step(adapter_id, AdamParams(**ADAM))
    return losses


def recomputed(ground: Ground) -> Outcome:
    """A pass with all activations kept, and with those of each layer computed again in the backward."""
    return {"kept": _one_pass(ground), "recomputed": _one_pass(ground, recompute=True)}


def long_datum(ground: Ground) -> Outcome:
    """The longest sequence exceeds the micro-batch, so its activations are computed again, and those of no other."""
    kept, some, everything = ({"token_budget": 40}, {"token_budget": 20}, {"token_budget": 20, "recompute": True})
    return {
        "kept": _one_pass(ground, **kept),
        "some": _one_pass(ground, **some),
        "all": _one_pass(ground, **everything),
    }


def _one_pass(ground: Ground, **options: Any) -> Outcome:
    bench = start(ground, **options)
    bench.engine.load_adapter("a", ground.reference.adapter_folder, optimizer=False)
    saved_bytes = 0

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved_bytes
        saved_bytes += tensor.numel() * tensor.element_size()
        return tensor

    # What autograd keeps; what a checkpointed layer would keep, and computes again, does not come by here.
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        output = bench.engine.run_pass("a", batch(), cross_entropy, backward=True)
    return {
        "loss": output.loss_sum,
        "logprobs": output.logprobs,
        "grads": bench.grads("a"),
        "saved_bytes": saved_bytes,
    }


def kept_bytes(ground: Ground) -> dict[str, float]:
    """What autograd keeps of a token for the backward, by dtype: every piece of memory once, without weights."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        engine = start(ground, dtype=dtype, token_budget=1024).engine
        engine.create_adapter("a", LoraSpec(RANK, seed=1))
        weights = [*engine.model.gpt.parameters(), engine.adapters["a"].weights]
        known = {x.untyped_storage().data_ptr() for x in weights}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, known: set[int] = known, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in known:
                kept[address] = tensor  # held, so that nothing else comes to lie there
            return tensor

        lengths = (170, 90, 310, 60)
        random = np.random.default_rng(0)
        rows = [random.integers(0, VOCAB, length + 1) for length in lengths]
        data = [Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:]}) for row in rows]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.run_pass("a", data, lambda logprobs_T, *_: -logprobs_T.sum(), backward=True)
        found[dtype] = sum(x.untyped_storage().nbytes() for x in kept.values()) / sum(lengths)
    return found


def many_sent(ground: Ground) -> Outcome:
    """A first stage far ahead of the second: how many of the tensors it sent are alive, and whether all arrived."""
    runtime = start(ground).engine.runtime
    links = Links(runtime)
    if runtime.is_first_stage:
        sent = []
        for number in range(20):
            hidden = torch.full((3, 1, 8), float(number))
            links.send_hidden(hidden)
            sent.append(StorageWeakRef(hidden.untyped_storage()))
            del hidden
        alive = sum(not storage.expired() for storage in sent)
        links.finish()
        return {"alive": alive}
    for number in range(20):
        hidden = links.receive_hidden(3, 8)
        assert hidden is not None and bool((hidden == number).all())
    return {}


def cache_held(ground: Ground) -> Outcome:
    """Tokens that the idle cache has room for after a sample, and after each thing done then."""
    engine = start(ground).engine
    engine.room.most_bytes = 0
    found = {}

    def after(what: str, act: Callable[[], Any]) -> None:
        engine.sample([SampleRequest("a", np.arange(3, 9, dtype=np.int32), 1, 4, seed=1)])
        act()
        assert engine._decoder is not None
        groups = engine._decoder._cache.groups.values()
        found[what] = sum(group.num_rows * group.lane_tokens for group in groups)

    engine.create_adapter("a", LoraSpec(RANK, seed=1))
    engine.snapshot("a", "a")
    after("a sample", lambda: None)
    after("a step", lambda: engine.optim_step("a", AdamParams(**ADAM)))
    after("saving", lambda: engine.save_adapter("a", ground.folder / "a", optimizer=True))
    after("a new adapter", lambda: engine.create_adapter("b", LoraSpec(RANK, seed=2)))
    after("bringing one back", lambda: engine.snapshot("a", "a"))
    after("loading", lambda: engine.load_adapter("c", ground.folder / "a", optimizer=True))
    return found


def little_data(ground: Ground) -> Outcome:
    """Batches of fewer data than data-parallel ranks: some ranks have none, and join each step all the same."""
    bench = start(ground)
    engine, data = bench.engine, batch()
    for name in ("joined", "split"):
        engine.load_adapter(name, ground.reference.adapter_folder, optimizer=False)
    joined = engine.run_pass("joined", data, cross_entropy, backward=True)
    single = [engine.run_pass("split", [datum], cross_entropy, backward=True) for datum in data]
    return {
        "joined": bench.grads("joined"),
        "split": bench.grads("split"),
        "losses": [joined.loss_sum, sum(output.loss_sum for output in single)],
        "forward_only": engine.run_pass("split", data[:1], cross_entropy, backward=False).loss_sum,
        "first": single[0].loss_sum,
    }


def in_bfloat16(ground: Ground) -> Outcome:
    """One pass and one step with weights and activations in bfloat16; adapters and optimizer stay in float32."""
    bench = start(ground, dtype="bfloat16")
    engine = bench.engine
    engine.load_adapter("a", ground.reference.adapter_folder, optimizer=False)
    before = bench.weights("a")
    output = engine.run_pass("a", batch(), cross_entropy, backward=True)
    grads = bench.grads("a")
    engine.optim_step("a", AdamParams(**ADAM))
    return {"loss": output.loss_sum, "grads": grads, "before": before, "after": bench.weights("a")}


def quantised(ground: Ground) -> Outcome:
    """The model as its publisher stores it."""
    folder = ground.folder / f"stored-{os.environ['RANK']}"
    if ground.family == "gpt_oss":
        quantised_models.write_mxfp4(ground.reference.model_folder, folder)
    else:
        quantised_models.write_fp8(ground.reference.model_folder, folder, FP8_BLOCK)
    bench = Bench(Engine.start(folder, ground.layout, token_budget=40), ground.folder, ground.references)
    bench.engine.load_adapter("a", ground.reference.adapter_folder, optimizer=False)
    trained = bench.engine.run_pass("a", batch(), cross_entropy, backward=True)
    return {
        "folder": folder,
        "base_logits": bench.logits_with(None),
        "loss": trained.loss_sum,
        "grads": bench.grads("a"),
    }
