"""The same numbers as transformers + peft in float32, under every layout. Run with -s to see the measured gaps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_reference import CONFIGS, EXPERTS, LENGTHS, Reference, load_transformers, logits_of, sequences

from tinker_hpc.peft_experts import expand_experts, has_stacked_experts

pytestmark = pytest.mark.distributed

LOGIT_TOLERANCE = 2e-5  # absolute, on logits up to about 10
GRADIENT_TOLERANCE = 2e-5  # max |difference| / max |reference| of each matrix


@pytest.fixture(params=list(CONFIGS))
def reference(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    return references[request.param]


@pytest.fixture
def parity(outcome_of: Callable[[str], dict[str, Any]], layout_name: str, reference: Reference) -> dict[str, Any]:
    return outcome_of(layout_name)["parity"][reference.family]


def largest_gap(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_logits(parity: dict[str, Any], reference: Reference, layout_name: str) -> None:
    gap = largest_gap(parity["logits"], reference.logits)
    scale = max(float(x.abs().max()) for x in reference.logits)
    print(f"\nPARITY {reference.family} {layout_name} logits max abs {gap:.2e} of {scale:.1f}")
    assert [x.shape[0] for x in parity["logits"]] == list(LENGTHS)
    assert scale > 1.0  # not vacuous
    assert gap <= LOGIT_TOLERANCE


def test_base_logits(parity: dict[str, Any], reference: Reference) -> None:
    model = load_transformers(reference.model_folder)
    gap = largest_gap(parity["base_logits"], [logits_of(model, s.tokens) for s in sequences()])
    assert gap <= LOGIT_TOLERANCE


def test_adapter_changes_the_logits(parity: dict[str, Any]) -> None:
    assert largest_gap(parity["logits"], parity["base_logits"]) > 0.1


def test_target_logprobs(parity: dict[str, Any], reference: Reference) -> None:
    for ours, logits, sequence in zip(parity["logprobs"], reference.logits, sequences(), strict=True):
        theirs = logits.double().log_softmax(-1).gather(1, torch.from_numpy(sequence.targets)[:, None])[:, 0]
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs.numpy()).max() <= LOGIT_TOLERANCE


def test_gradients(parity: dict[str, Any], reference: Reference, layout_name: str) -> None:
    ours, theirs = parity["grads"], reference.grads
    assert ours.keys() == theirs.keys()
    gaps = {key: float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in theirs}
    worst = max(gaps, key=lambda key: gaps[key])
    print(f"\nPARITY {reference.family} {layout_name} gradients worst {gaps[worst]:.2e} ({worst})")
    assert gaps[worst] <= GRADIENT_TOLERANCE, worst


def test_five_adamw_steps(parity: dict[str, Any], reference: Reference, layout_name: str) -> None:
    """Clipping is active (the norm exceeds 1) and the losses agree to four decimals, per token."""
    tokens = sum(LENGTHS)
    gaps = [abs(a - b) / tokens for a, b in zip(parity["losses"], reference.losses, strict=True)]
    norm_gap = max(abs(a - b) / b for a, b in zip(parity["norms"], reference.norms, strict=True))
    print(f"\nPARITY {reference.family} {layout_name} five steps: loss/token {max(gaps):.1e}, norm rel {norm_gap:.1e}")
    assert min(reference.norms) > 1.0
    assert reference.losses[-1] < reference.losses[0] - 1.0
    assert max(gaps) < 5e-5
    assert norm_gap < 1e-4


def taken_apart(saved: Path, folder: Path) -> Path:
    """What `tinker-hpc export` makes of a saved adapter with stacked experts."""
    shutil.copyfile(saved / "adapter_config.json", folder / "adapter_config.json")
    assert has_stacked_experts(saved / "adapter_model.safetensors")
    expand_experts(saved / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    return folder


def test_peft_loads_what_we_export(parity: dict[str, Any], reference: Reference, tmp_path: Path) -> None:
    """After five steps: peft on transformers, given our folder, computes our logits (unembedding included)."""
    from peft import PeftModel

    folder = parity["export"]
    if reference.family in EXPERTS:
        folder = taken_apart(folder, tmp_path)
    model = PeftModel.from_pretrained(load_transformers(reference.model_folder), str(folder))
    assert "lm_head" in model.peft_config["default"].target_modules
    gap = largest_gap(parity["exported_logits"], [logits_of(model, s.tokens) for s in sequences()])
    assert largest_gap(parity["exported_logits"], reference.logits) > 1e-3  # training moved them
    assert gap <= LOGIT_TOLERANCE
