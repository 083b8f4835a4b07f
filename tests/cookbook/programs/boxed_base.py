"""A base model for rl_loop to learn from: the tiny one, taught to answer with a \\boxed{} number, the right one or not.

boxed_base.py SOURCE TARGET MODEL_NAME STEPS

The tiny base never says \\boxed{}, so the recipe would reward nothing and no step would move the weights.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import torch
from tinker_cookbook import model_info, renderers
from transformers import AutoModelForCausalLM, AutoTokenizer

SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
PREFIX = [  # the recipe's own first words
    {"role": "user", "content": "How many r's are in strawberry?" + SUFFIX},
    {
        "role": "assistant",
        "content": "Let's spell the word out and number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r "
        "10) y. We have r's at positions 3, 8, and 9. \\boxed{3}",
    },
]


def example(renderer, tokenizer, draw: random.Random) -> tuple[list[int], int]:
    """Tokens of a question and some answer; where the answer begins."""
    a, b = draw.randint(1, 3), draw.randint(1, 3)
    asked = {"role": "user", "content": f"What is {a} + {b}?" + SUFFIX}
    prompt = renderer.build_generation_prompt([*PREFIX, asked]).to_ints()
    return prompt + tokenizer.encode(f"\\boxed{{{draw.randint(3, 5)}}}", add_special_tokens=False), len(prompt)


def main(source: Path, target: Path, name: str, steps: int) -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    renderer = renderers.get_renderer(model_info.get_recommended_renderer_name(name), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    stop = renderer.get_stop_sequences()[0]
    for step in range(steps):
        loss = torch.zeros(())
        for tokens, start in [example(renderer, tokenizer, draw) for _ in range(4)]:
            tokens.append(stop if isinstance(stop, int) else tokenizer.encode(stop, add_special_tokens=False)[0])
            labels = [-100] * start + tokens[start:]
            loss = loss + model(torch.tensor([tokens]), labels=torch.tensor([labels])).loss / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(step, float(loss.detach()), flush=True)
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    model.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
