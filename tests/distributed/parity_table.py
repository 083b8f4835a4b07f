"""The table of parity with transformers + peft: `python tests/distributed/parity_table.py` measures it anew.

Every family under every layout that applies to it, in float32 on CPU (gloo); written to docs/parity.md.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import parity_reference
import torch
from jobs import LAYOUTS, Job, Outcomes, applies
from parity_reference import CONFIGS, LENGTHS, Reference

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"
JOBS = [
    Job(layout, "parity_scenarios:parity", family)
    for layout in LAYOUTS
    for family in CONFIGS
    if applies(layout, family)
]


class Gaps(NamedTuple):
    """How far we are from transformers + peft."""

    logits: float
    """largest absolute difference, of logits up to about 10"""
    gradients: float
    """largest difference in a matrix over its largest entry, of the worst matrix"""
    losses: float
    """per token, the largest over five clipped AdamW steps"""
    norms: float
    """of the gradient before clipping, relative, the largest over the steps"""


BOUNDS = Gaps(logits=2e-5, gradients=2e-5, losses=5e-5, norms=1e-4)

HEAD = f"""\
# Parity with transformers + peft

Tiny random models of every family, with LoRA on every linear layer, the experts and the unembedding, in float32 on CPU,
under every layout; the same model and adapter in transformers + peft, one process, eager. Measured by
`python tests/distributed/parity_table.py`; `pytest tests/distributed/test_parity.py` measures all of it again and holds
the bounds.

- Sequence parallelism is always on where TP is more than 1, so TP2 is TP2 + SP; there is no TP without it.
- EP shares the ranks of TP and DP (expert tensor parallel size 1): EP2 is two data-parallel ranks, TP2+EP2 two
  tensor-parallel ones, TP2+EP4 is TP2×DP2 with the experts over all four, PP2+EP2 has two stages of EP2.
- `qwen3_moe` has Tinker's shared-outer LoRA on its experts; `qwen3_moe_per_expert` A and B of its own for each expert,
  and router weights that are not scaled to sum to 1. `qwen3_bf16` is stored in bfloat16.
- logits: largest absolute difference, with a trained adapter (bound {BOUNDS.logits:.0e}). Gradients: largest difference
  over largest entry, of the worst LoRA matrix (bound {BOUNDS.gradients:.0e}). Loss: difference per token, the largest
  of five AdamW steps with clipping (bound {BOUNDS.losses:.0e}).

| layout | ranks | family | logits | LoRA gradients | loss, five steps |
|---|---|---|---|---|---|
"""
_ROW = re.compile(r"\| (\S+) \| (\d+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|")


def largest_gap(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def measure(ours: Mapping[str, Any], theirs: Reference) -> Gaps:
    """Of the outcome of a parity job and its reference."""
    assert ours["grads"].keys() == theirs.grads.keys()
    return Gaps(
        logits=largest_gap(ours["logits"], theirs.logits),
        gradients=max(float((ours["grads"][k] - g).abs().max() / g.abs().max()) for k, g in theirs.grads.items()),
        losses=max(abs(a - b) for a, b in zip(ours["losses"], theirs.losses, strict=True)) / sum(LENGTHS),
        norms=max(abs(a - b) / b for a, b in zip(ours["norms"], theirs.norms, strict=True)),
    )


def read_table() -> dict[tuple[str, str], tuple[float, ...]]:
    """(layout, family) -> the numbers in the committed table."""
    rows = [match.groups() for line in TABLE.read_text().splitlines() if (match := _ROW.fullmatch(line))]
    return {(layout, family): tuple(map(float, numbers)) for layout, _, family, *numbers in rows}


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)  # the ranks want the cores
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        references = {family: parity_reference.build(family, folder / family) for family in CONFIGS}
        outcomes = Outcomes(JOBS, references.__getitem__, folder)
        lines = []
        for job in JOBS:
            gaps = measure(outcomes(job), references[job.family])
            numbers = f"{gaps.logits:.1e} | {gaps.gradients:.1e} | {gaps.losses:.1e}"
            lines.append(f"| {job.layout} | {job.num_ranks} | {job.family} | {numbers} |\n")
    TABLE.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
