"""The table of parity with transformers + peft: `python tests/distributed/parity_table.py` measures it anew.

Every family under every layout that applies to it, in float32 on CPU (gloo); written to docs/parity.md. Named families
are measured alone, and the rows of the others stay as they are: `python tests/distributed/parity_table.py qwen2 llama`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
  and router weights that are not scaled to sum to 1. `qwen3_bf16` is stored in bfloat16. `qwen2` has what no 2 divides:
  one key-value head, of which ranks hold copies, an odd vocabulary and an odd number of layers. `gpt_oss` has sinks, a
  window shorter than the sequences and a clamp that bites, `deepseek_v3` latent attention, groups of experts and a
  shared one; peft adapts their experts as parameters.
- logits: largest absolute difference, with a trained adapter (bound {BOUNDS.logits:.0e}). Gradients: largest difference
  over largest entry, of the worst LoRA matrix (bound {BOUNDS.gradients:.0e}). Loss: difference per token, the largest
  of five AdamW steps with clipping (bound {BOUNDS.losses:.0e}).

| layout | ranks | family | logits | LoRA gradients | loss, five steps |
|---|---|---|---|---|---|
"""
_ROW = re.compile(r"\| (\S+) \| \d+ \| (\S+) \| \S+ \| \S+ \| \S+ \|")


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
    return {row: tuple(map(float, line.strip(" |").split(" | ")[3:])) for line, row in _rows()}


def _rows() -> Iterator[tuple[str, tuple[str, str]]]:
    for line in TABLE.read_text().splitlines():
        if match := _ROW.fullmatch(line):
            yield line, (match[1], match[2])


def main(families: Sequence[str]) -> None:
    """Measure and write."""
    torch.set_num_threads(1)  # the ranks want the cores
    rows = {(layout, family): line for line, (layout, family) in _rows()}
    jobs = [job for job in JOBS if job.family in (families or CONFIGS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        references = {family: parity_reference.build(family, folder / family) for family in {j.family for j in jobs}}
        outcomes = Outcomes(jobs, references.__getitem__, folder)
        for job in jobs:
            gaps = measure(outcomes(job), references[job.family])
            numbers = f"{gaps.logits:.1e} | {gaps.gradients:.1e} | {gaps.losses:.1e}"
            rows[job.layout, job.family] = f"| {job.layout} | {job.num_ranks} | {job.family} | {numbers} |"
    table = [rows[job.layout, job.family] for job in JOBS if (job.layout, job.family) in rows]
    TABLE.write_text(HEAD + "\n".join(table) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
