"""tinker_cookbook.weights on our checkpoints: its exports compute, in transformers and peft, what the sampler did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_runner import STUDENT, TINY, Place

from tinker_hpc.demo import peft_logprobs

PROGRAM = Path(__file__).resolve().parent / "programs" / "export_weights.py"


def merged_logprobs(folder: Path, tokens: list[int]) -> list[float]:
    """Natural logprobs of tokens 1.. by transformers alone, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens_T = torch.tensor(tokens)
    with torch.no_grad():
        logprobs_TV = model(tokens_T[None]).logits[0].log_softmax(-1)
    return logprobs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0].tolist()


def test_peft_and_merged_exports(served: Place) -> None:
    out = served.root / "exports"
    printed = served.python(str(PROGRAM), STUDENT, str(TINY), str(out))
    result = json.loads(printed.splitlines()[-1])
    base = merged_logprobs(TINY, result["tokens"])
    assert max(abs(a - b) for a, b in zip(base, result["logprobs"], strict=True)) > 0.1, "nothing was learned"
    assert peft_logprobs(TINY, out / "peft", result["tokens"]) == pytest.approx(result["logprobs"], abs=1e-4)
    # Merged shard by shard, the weights keep the base's bfloat16 and round; merged whole, they are float32 as asked.
    assert merged_logprobs(out / "merged", result["tokens"]) == pytest.approx(result["logprobs"], abs=1e-4)
