"""What the ranks of the GPU tests run: the same engine, on CUDA and NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_scenarios import Bench, batch, cross_entropy

from megatron_adapters.engine import AdamParams, Datum, Engine, Layout, LoraSpec, Pass, PassOutput, SampleRequest
from megatron_adapters.out_of_memory import is_out_of_memory
from megatron_adapters.packing import smaller_budget


def train(model_folder: Path, adapter_folder: Path, layout: Layout, dtype: str, folder: Path) -> dict[str, Any]:
    """Logprobs of an imported adapter, twenty steps of a fresh one, a state saved and stepped again."""
    engine = Engine.start(model_folder, layout, dtype=dtype)
    assert engine.runtime.device.type == "cuda"
    engine.load_adapter("imported", adapter_folder, optimizer=False)
    imported = engine.run_pass("imported", batch(), cross_entropy, backward=True)
    bench = Bench(engine, folder)
    grads = {key: x.cpu() for key, x in bench.grads("imported").items()}
    engine.create_adapter("fresh", LoraSpec(rank=8, seed=1))
    losses = []
    for _ in range(20):
        losses.append(engine.run_pass("fresh", batch(), cross_entropy, backward=True).loss_sum)
        engine.optim_step("fresh", AdamParams(learning_rate=1e-2))
    engine.save_adapter("fresh", folder / "state", optimizer=True)
    engine.load_adapter("again", folder / "state", optimizer=True)
    after = [engine.run_pass(name, batch(), cross_entropy, backward=False).logprobs for name in ("fresh", "again")]
    peak = torch.cuda.max_memory_allocated()
    engine.stop()
    return {
        "logprobs": imported.logprobs,
        "grads": grads,
        "losses": losses,
        "same_after_loading": all(np.array_equal(a, b) for a, b in zip(*after, strict=True)),
        "peak_memory_gib": peak / 2**30,
    }


def mixed(model_folder: Path, adapter_folder: Path, layout: Layout, dtype: str, folder: Path) -> dict[str, Any]:
    """Logprobs and gradients of three adapters in one batch, and of each alone."""
    engine = Engine.start(model_folder, layout, dtype=dtype)
    bench = Bench(engine, folder)
    engine.load_adapter("imported", adapter_folder, optimizer=False)
    engine.create_adapter("rank-1", LoraSpec(rank=1, seed=1))
    engine.create_adapter("mlp", LoraSpec(rank=19, seed=2, train_attn=False, train_unembed=False))
    names = list(engine.adapters)
    for name in names[1:]:  # B is zero at first
        engine.run_pass(name, batch(), cross_entropy, backward=True)
        engine.optim_step(name, AdamParams(learning_rate=1e-2))
    found: dict[str, Any] = {}
    for how in ("alone", "together"):
        passes = [Pass(name, batch(), cross_entropy) for name in names]
        groups = [passes] if how == "together" else [[one] for one in passes]
        outputs = [output for group in groups for output in engine.run_passes(group, backward=True)]
        for name, output in zip(names, outputs, strict=True):
            assert isinstance(output, PassOutput), output
            grads = torch.cat([x.cpu().flatten() for _, x in sorted(bench.grads(name).items())])
            found.setdefault(name, {})[how] = {"logprobs": np.concatenate(output.logprobs), "grads": grads}
            engine.adapters[name].zero_grad()
    engine.stop()
    return found


def recompute(model_folder: Path, adapter_folder: Path, layout: Layout, dtype: str, folder: Path) -> dict[str, Any]:
    """One pass with the activations kept, and with those of each layer computed again."""
    found = {}
    for name, again in (("kept", False), ("again", True)):
        engine = Engine.start(model_folder, layout, dtype=dtype, recompute=again)
        engine.load_adapter("a", adapter_folder, optimizer=False)
        logprobs = engine.run_pass("a", batch(), cross_entropy, backward=True).logprobs
        grads = {key: x.cpu() for key, x in Bench(engine, folder).grads("a").items()}
        found[name] = {"logprobs": logprobs, "grads": grads}
    engine.stop()
    return found


def sample(model_folder: Path, adapter_folder: Path, layout: Layout, dtype: str, folder: Path) -> dict[str, Any]:
    """Samples with every setting of a draw side by side, and what the trainer makes of the same tokens."""
    engine = Engine.start(model_folder, layout, dtype=dtype)
    engine.load_adapter("a", adapter_folder, optimizer=False)
    engine.snapshot("a", "a")
    rng = np.random.default_rng(0)
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.7}]
    prompts = [rng.integers(3, 120, 5 + 3 * place, dtype=np.int32) for place in range(len(settings))]
    results = engine.sample(
        [SampleRequest("a", prompt, 2, 40, seed=7, **more) for prompt, more in zip(prompts, settings, strict=True)]
    )
    data, sampled = [], []
    for prompt, result in zip(prompts, results, strict=True):
        for sequence in result.sequences:
            whole = np.concatenate((prompt, sequence.tokens))
            data.append(Datum(whole[:-1], {"target_tokens": whole[1:].astype(np.int64)}))
            sampled.append(sequence.logprobs)
    trained = engine.run_pass("a", data, logprob_sum, backward=False).logprobs
    gaps = [np.abs(ours - theirs[-len(ours) :]) for ours, theirs in zip(sampled, trained, strict=True)]
    engine.stop()
    return {"errors": [result.error for result in results], "gaps": gaps}


def out_of_memory(model_folder: Path) -> dict[str, Any]:
    """A pass with all of the GPU's memory, then cut smaller with too little of it, as worker/loop.py cuts it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 120, (24, 257), dtype=np.int32)
    data = [Datum(row[:-1], {"target_tokens": row[1:].astype(np.int64)}) for row in tokens]
    lengths = [256] * len(data)
    engine = Engine.start(model_folder, Layout(), dtype="float32", token_budget=sum(lengths))
    for name in ("ample", "little"):
        engine.create_adapter(name, LoraSpec(rank=8, seed=1))
    engine.run_pass("ample", data[:1], logprob_sum, backward=False)  # workspaces of cuBLAS
    engine.recover_memory()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    ample = engine.run_pass("ample", data, logprob_sum, backward=True)
    needed = torch.cuda.max_memory_reserved() - before
    engine.recover_memory()

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.45 * needed) / total)
    budget, errors = engine.token_budget, []
    while True:
        try:
            [little] = engine.run_passes([Pass("little", data, logprob_sum)], backward=True, token_budget=budget)
            break
        except Exception as error:
            assert is_out_of_memory(error), error
            errors.append(type(error).__name__)
        engine.recover_memory()
        smaller = smaller_budget(lengths, budget)
        assert smaller is not None, "not even one sequence fits"
        budget = smaller
    assert isinstance(little, PassOutput)
    logprobs = [max(np.abs(a - b).max() for a, b in zip(ample.logprobs, little.logprobs, strict=True))]
    norms = [engine.optim_step(name, AdamParams())["grad_norm:mean"] for name in ("ample", "little")]
    engine.stop()
    return {"errors": errors, "budget": budget, "logprobs": float(logprobs[0]), "norms": norms}


def logprob_sum(logprobs: torch.Tensor, inputs: Any, segment_ids: torch.Tensor) -> torch.Tensor:
    """The negative sum of all logprobs."""
    return -logprobs.sum()
