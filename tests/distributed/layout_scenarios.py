"""What the ranks of a layout with stages or shared experts run: parity, sampling, and a state to hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parity_reference import ADAM, Reference
from parity_scenarios import Bench, batch, cross_entropy, parity
from sampling_scenarios import greedy

from megatron_adapters.engine import AdamParams, Engine, Layout


def run_all(references: dict[str, Reference], layout: Layout, folder: Path, resumed: list[Path]) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    for family, reference in references.items():
        engine = Engine.start(reference.model_folder, layout, token_budget=40)  # several micro-batches
        outcome[family] = parity(Bench(engine, folder), reference)
        engine.load_snapshot("peft", reference.adapter_folder)
        outcome[family]["greedy"] = greedy(engine)
        state = folder / f"state-{family}"
        engine.save_adapter("a", state, optimizer=True)
        outcome[family]["state"] = state
        outcome[family]["next_losses"] = [next_losses(engine, path) for path in [state, *resumed]]
    engine.stop()
    return outcome


def next_losses(engine: Engine, state: Path) -> list[float]:
    """Five more steps on a saved state, of this layout or another."""
    engine.load_adapter("next", state, optimizer=True)
    losses = []
    for _ in range(5):
        losses.append(engine.run_pass("next", batch(), cross_entropy, backward=True).loss_sum)
        engine.optim_step("next", AdamParams(**ADAM))
    return losses
