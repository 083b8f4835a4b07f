"""The same numbers as transformers + peft in float32, under every layout. Run with -s to see the measured gaps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job
from parity_reference import (
    CONFIGS,
    EXPERTS,
    LENGTHS,
    Reference,
    load_transformers,
    logits_of,
    peft_on_parameters,
    sequences,
)
from parity_table import BOUNDS, JOBS, Gaps, largest_gap, measure, read_table
from safetensors.torch import load_file

from tinker_hpc.merged_export import export_merged
from tinker_hpc.peft_export import export_adapter

pytestmark = pytest.mark.distributed

EXPORTING = ("TP1", "TP2×DP2", "TP2×PP2", "TP2+EP4")
"""Layouts whose trained adapter is given to peft, which takes longer than training it."""


@pytest.fixture(params=JOBS, ids=str)
def job(request: pytest.FixtureRequest) -> Job:
    return request.param


@pytest.fixture
def parity(outcome_of: Callable[[Job], dict[str, Any]], job: Job) -> dict[str, Any]:
    return outcome_of(job)


@pytest.fixture
def reference(references: dict[str, Reference], job: Job) -> Reference:
    return references[job.family]


@pytest.fixture
def gaps(parity: dict[str, Any], reference: Reference, job: Job) -> Gaps:
    found = measure(parity, reference)
    print(f"\nPARITY {job} {found}")
    return found


def test_logits(gaps: Gaps, parity: dict[str, Any], reference: Reference) -> None:
    assert [x.shape[0] for x in parity["logits"]] == list(LENGTHS)
    assert max(float(x.abs().max()) for x in reference.logits) > 1.0  # not vacuous
    assert largest_gap(parity["logits"], parity["base_logits"]) > 0.1  # the adapter matters
    assert gaps.logits <= BOUNDS.logits


def test_base_logits(parity: dict[str, Any], reference: Reference) -> None:
    assert largest_gap(parity["base_logits"], reference.base_logits) <= BOUNDS.logits


def test_target_logprobs(parity: dict[str, Any], reference: Reference) -> None:
    for ours, logits, sequence in zip(parity["logprobs"], reference.logits, sequences(), strict=True):
        theirs = logits.double().log_softmax(-1).gather(1, torch.from_numpy(sequence.targets)[:, None])[:, 0]
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs.numpy()).max() <= BOUNDS.logits


def test_gradients(gaps: Gaps) -> None:
    assert gaps.gradients <= BOUNDS.gradients


def test_five_adamw_steps(gaps: Gaps, reference: Reference) -> None:
    """Clipping is active (the norm exceeds 1)."""
    assert min(reference.norms) > 1.0
    assert reference.losses[-1] < reference.losses[0] - 1.0
    assert gaps.losses <= BOUNDS.losses
    assert gaps.norms <= BOUNDS.norms


def test_the_committed_table_has_every_row_and_holds_the_bounds() -> None:
    table = read_table()
    assert list(table) == [(job.layout, job.family) for job in JOBS], "run: python tests/distributed/parity_table.py"
    for row, numbers in table.items():
        assert all(0 < value <= bound for value, bound in zip(numbers, BOUNDS[:3], strict=True)), row
    assert {family for _, family in table} == set(CONFIGS)


def peft_with(saved: Path, reference: Reference, folder: Path) -> Any:
    """transformers + peft with the adapter in `saved`, as `tinker-hpc export` gives it. folder: to write it to."""
    if reference.family == "deepseek_v3":  # peft 0.21 does not load it (docs/families.md): its parameters, by name
        model, parameters = peft_on_parameters(reference.family, reference.model_folder)
        parameters.write(load_file(saved / "adapter_model.safetensors"))
        return model
    from peft import PeftModel

    export_adapter(saved, folder)
    model = PeftModel.from_pretrained(load_transformers(reference.model_folder), str(folder))
    assert "lm_head" in model.peft_config["default"].target_modules
    return model


@pytest.mark.parametrize("job", [job for job in JOBS if job.layout in EXPORTING], ids=str)
def test_peft_computes_with_what_we_save(parity: dict[str, Any], reference: Reference, tmp_path: Path) -> None:
    """After five steps: peft on transformers, given our folder, computes our logits (unembedding included)."""
    model = peft_with(parity["export"], reference, tmp_path)
    gap = largest_gap(parity["exported_logits"], [logits_of(model, s.tokens) for s in sequences()])
    assert largest_gap(parity["exported_logits"], reference.logits) > 1e-3  # training moved them
    assert gap <= BOUNDS.logits


@pytest.mark.parametrize("job", [j for j in JOBS if j.layout == "TP1" and j.family in EXPERTS], ids=str)
def test_a_merged_model_needs_no_peft(parity: dict[str, Any], reference: Reference, tmp_path: Path) -> None:
    """transformers alone, on what `tinker-hpc export --merged` writes, computes our logits."""
    model = load_transformers(export_merged(reference.model_folder, parity["export"], tmp_path / "merged"))
    gap = largest_gap(parity["exported_logits"], [logits_of(model, s.tokens) for s in sequences()])
    assert gap <= BOUNDS.logits
