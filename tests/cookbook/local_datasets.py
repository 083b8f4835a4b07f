"""The hub's datasets that the cookbook's recipes ask for, as local folders of a few made-up rows.

`datasets.load_dataset("openai/gsm8k", "main")` prefers a folder ./openai/gsm8k to the hub's dataset of that name. Each
folder here has that dataset's configurations, splits and columns; the rows are sums that the tiny base can do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Rows = Iterable[Mapping[str, Any]]


def write(folder: Path, splits: Mapping[str, Rows], config: str = "default") -> None:
    """One dataset: a JSON-lines file a split, and the README that names them, as on the hub."""
    (folder / config).mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        path = folder / config / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"  - split: {split}\n    path: {config}/{split}.jsonl")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: " + config + "\n  data_files:\n" + "\n".join(files) + "\n---\n"
    )


def sums(num_rows: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of two-digit numbers."""
    rng = random.Random(seed)
    return [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(num_rows)]


def chat(a: int, b: int) -> list[dict[str, str]]:
    """A question and its right answer."""
    return [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": str(a + b)}]


def dialogue(a: int, b: int, answer: int) -> str:
    """The same as the text of hh-rlhf."""
    return f"\n\nHuman: What is {a} + {b}?\n\nAssistant: {answer}"


def write_all(folder: Path) -> None:
    """Every dataset of the recipes that the tier runs, under `folder`, by hub name."""
    # sl_basic's batches are of 128 and cannot be made smaller from its command line.
    chats = {
        split: [{"messages": chat(a, b)} for a, b in rows]
        for split, rows in (("train", sums(128, 0)), ("test", sums(128, 1)))
    }
    write(folder / "HuggingFaceH4" / "no_robots", chats)
    write(folder / "allenai" / "tulu-3-sft-mixture", {"train": [{"messages": chat(a, b)} for a, b in sums(1100, 2)]})
    grade_school = {
        split: [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in rows]
        for split, rows in (("train", sums(8, 3)), ("test", sums(4, 4)))
    }
    write(folder / "openai" / "gsm8k", grade_school, config="main")
    preferences = {
        split: [{"chosen": dialogue(a, b, a + b), "rejected": dialogue(a, b, a + b + 10)} for a, b in rows]
        for split, rows in (("train", sums(256, 5)), ("test", sums(4, 6)))
    }
    write(folder / "Anthropic" / "hh-rlhf", preferences)
    deep = [{"question": f"What is {a} + {b}?", "final_answer": str(a + b)} for a, b in sums(192, 7)]
    write(folder / "zwhe99" / "DeepMath-103K", {"train": deep})
