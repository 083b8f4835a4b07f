"""A plain Tinker program: supervised fine-tuning on a few sentences. Prints one JSON object.

sft_loop.py BASE_MODEL STEPS [PAUSE_S]        PAUSE_S: seconds to rest after each step
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import tinker

SENTENCES = ("Q: what is two plus two? A: four, my friend.", "Q: what is the sea? A: blue, my friend.")


def main(
    base_model: str,
    steps: int,
    pause_s: float = 0.0,
    service: tinker.ServiceClient | None = None,
    rest: Callable[[int], None] | None = None,
) -> dict[str, object]:
    """Train, save, and say what happened. `rest(step)` is called after each step, instead of a pause."""
    rest = rest or (lambda step: time.sleep(pause_s))
    client = (
        (service or tinker.ServiceClient()).create_lora_training_client(base_model=base_model, rank=8, seed=1).result()
    )
    tokenizer = client.get_tokenizer()
    data = []
    for sentence in SENTENCES:
        tokens = tokenizer.encode(sentence)
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
            )
        )
    losses = []
    for step in range(steps):
        forward_backward = client.forward_backward(data, "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=2e-3)).result()
        losses.append(forward_backward.result().metrics["loss:sum"])
        rest(step)
    return {"losses": losses, "checkpoint": client.save_state("final").result().path}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))))
