"""Families whose experts peft adapts as parameters: the same numbers as transformers + peft, experts and heads spread.

One layout in the suite; all that apply with

    TINKER_HPC_ALL_LAYOUTS=1 pytest tests/distributed/test_more_families.py -s
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from jobs import LAYOUTS, Job
from parity_reference import MORE_CONFIGS, Reference, load_transformers, logits_of, sequences
from parity_table import BOUNDS, largest_gap, measure
from sampling_scenarios import prompts
from test_sampling import generate, tokens_of

pytestmark = pytest.mark.distributed

Outcomes = Callable[[Job], Any]

CHOSEN = list(LAYOUTS) if os.environ.get("TINKER_HPC_ALL_LAYOUTS") else ["TP2+EP2"]
PARITY = [Job(layout, "parity_scenarios:parity", family) for layout in CHOSEN for family in MORE_CONFIGS]
SAMPLING = [Job(layout, "layout_scenarios:greedy", family) for layout in CHOSEN for family in MORE_CONFIGS]


@pytest.mark.parametrize("job", PARITY, ids=str)
def test_numbers_are_those_of_peft(job: Job, outcome_of: Outcomes, references: dict[str, Reference]) -> None:
    ours, theirs = outcome_of(job), references[job.family]
    gaps = measure(ours, theirs)
    print(f"\nPARITY {job} {gaps}")
    assert max(float(x.abs().max()) for x in theirs.logits) > 1.0  # not vacuous
    assert all(gap <= bound for gap, bound in zip(gaps, BOUNDS, strict=True)), gaps
    model = load_transformers(theirs.model_folder)
    assert largest_gap(ours["base_logits"], [logits_of(model, s.tokens) for s in sequences()]) <= BOUNDS.logits


@pytest.mark.parametrize("job", SAMPLING, ids=str)
def test_greedy_tokens_are_those_of_generate(job: Job, outcome_of: Outcomes, references: dict[str, Reference]) -> None:
    """Through the cache, from prompts of up to 64 tokens: longer than a window."""
    model = load_transformers(references[job.family].model_folder)
    results = outcome_of(job)
    assert [tokens_of(result)[0] for result in results[None]] == [generate(model, x).tolist() for x in prompts()]
    assert [tokens_of(result)[0] for result in results["peft"]] != [tokens_of(result)[0] for result in results[None]]
