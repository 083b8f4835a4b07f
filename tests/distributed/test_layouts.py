"""Experts and pipeline stages: the same numbers as transformers + peft, and states that any layout goes on with.

TINKER_HPC_PARITY_TABLE=docs/parity.md pytest tests/distributed/test_layouts.py writes what was measured there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gloo_launcher import run_ranks
from parity_reference import LENGTHS, Reference, load_transformers
from sampling_scenarios import prompts
from test_parity import GRADIENT_TOLERANCE, LOGIT_TOLERANCE, largest_gap
from test_sampling import generate, tokens_of

from megatron_adapters.interface import Layout

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "TP2+EP2": Layout(2, 1, 1, 2),
    "EP2": Layout(1, 2, 1, 2),
    "PP2": Layout(1, 1, 2, 1),
    "PP2+EP2": Layout(1, 2, 2, 2),
}
FAMILY = {"PP2": ("qwen2", "qwen3_moe")}  # tied embeddings on two stages
CASES = [(layout, family) for layout in LAYOUTS for family in FAMILY.get(layout, ("qwen3_moe",))]
RESUMING = ("EP2", "PP2+EP2")
measured: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def run_under(
    references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in done:
            resumed = (
                [] if name == "TP2+EP2" or len(FAMILY.get(name, "x")) > 1 else [run("TP2+EP2")["qwen3_moe"]["state"]]
            )
            mine = {family: references[family] for family in FAMILY.get(name, ("qwen3_moe",))}
            folder, layout = tmp_path_factory.mktemp("layout"), LAYOUTS[name]
            arguments = (mine, layout, folder, resumed)
            done[name] = run_ranks("layout_scenarios:run_all", layout.world_size, folder, *arguments)
        return done[name]

    return run


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    target = os.environ.get("TINKER_HPC_PARITY_TABLE")
    if target and measured:
        head = "| layout | family | logits, max abs | LoRA gradient, worst, relative | loss per token, five steps |"
        rows = [f"| {layout} | {family} | {numbers} |" for (layout, family), numbers in measured.items()]
        Path(target).write_text("\n".join([head, "|---|---|---|---|---|", *rows]) + "\n")


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_numbers_are_those_of_peft(layout: str, family: str, run_under: Any, references: dict[str, Reference]) -> None:
    ours, theirs = run_under(layout)[family], references[family]
    logits = largest_gap(ours["logits"], theirs.logits)
    assert ours["grads"].keys() == theirs.grads.keys()
    grads = max(float((ours["grads"][k] - g).abs().max() / g.abs().max()) for k, g in theirs.grads.items())
    losses = max(abs(a - b) for a, b in zip(ours["losses"], theirs.losses, strict=True)) / sum(LENGTHS)
    norms = max(abs(a - b) / b for a, b in zip(ours["norms"], theirs.norms, strict=True))
    measured[layout, family] = f"{logits:.1e} | {grads:.1e} | {losses:.1e}"
    assert logits <= LOGIT_TOLERANCE
    assert grads <= GRADIENT_TOLERANCE
    assert losses < 5e-5 and norms < 1e-4


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_greedy_tokens_are_those_of_generate(layout: str, run_under: Any, references: dict[str, Reference]) -> None:
    model = load_transformers(references["qwen3_moe"].model_folder)
    theirs = [generate(model, prompt).tolist() for prompt in prompts()]
    results = run_under(layout)["qwen3_moe"]["greedy"]
    assert [tokens_of(result)[0] for result in results[None]] == theirs
    assert [tokens_of(result)[0] for result in results["peft"]] != theirs  # the adapter matters


@pytest.mark.parametrize("layout", RESUMING)
def test_a_state_of_tp2_ep2_goes_on_elsewhere(layout: str, run_under: Any) -> None:
    expected = run_under("TP2+EP2")["qwen3_moe"]["next_losses"][0]
    own, resumed = run_under(layout)["qwen3_moe"]["next_losses"]
    assert expected[-1] < expected[0]
    for losses in (own, resumed):  # trained here, and trained there, from the same adapter
        gap = max(abs(a - b) for a, b in zip(losses, expected, strict=True)) / sum(LENGTHS)
        assert gap < 1e-5
