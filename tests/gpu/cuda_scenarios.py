"""What the ranks of the GPU tests run: the same engine, on CUDA and NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_scenarios import Bench, batch, cross_entropy

from megatron_adapters.engine import AdamParams, Engine, Layout, LoraSpec


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
