"""An ordinary loop that trains and samples; argv: base model, then JSON of what is below. Prints one JSON line a step.

steps       how many
die_at      SIGKILL itself when this step's requests are on their way; None: never
other_from  from this step on it trains on other data
sample      whether to sample from the weights of each step
control     a folder: before step n, and before the end as step `steps`, it makes at-<n> there and waits for go-<n>
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import tinker


def datum(seed: int) -> tinker.Datum:
    tokens = [random.Random(seed).randrange(3, 250) for _ in range(13)]
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * 12}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def gate(step: int) -> None:
    if asked.get("control"):
        (Path(asked["control"]) / f"at-{step}").touch()
        while not (Path(asked["control"]) / f"go-{step}").exists():
            time.sleep(0.01)


base_model, asked = sys.argv[1], json.loads(sys.argv[2])
service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model=base_model, rank=4, seed=1).result(timeout=200)
for step in range(asked["steps"]):
    gate(step)
    seed = step + (1000 if asked.get("other_from") is not None and step >= asked["other_from"] else 0)
    passed = client.forward_backward([datum(seed)], "cross_entropy")
    stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-2))
    if step == asked.get("die_at"):
        passed.result(timeout=200)  # the step itself is still on its way
        os.kill(os.getpid(), signal.SIGKILL)
    numbers = [passed.result(timeout=200).metrics["loss:sum"], stepped.result(timeout=200).metrics["grad_norm:mean"]]
    tokens: list[list[int]] = []
    if asked.get("sample"):
        sampler = client.save_weights_and_get_sampling_client().result(timeout=200)
        params = tinker.SamplingParams(max_tokens=6, stop=[], seed=step)
        drawn = sampler.sample(prompt=datum(step).model_input, num_samples=2, sampling_params=params)
        tokens = [list(sequence.tokens) for sequence in drawn.result(timeout=200).sequences]
    line = {"step": step, "numbers": numbers, "tokens": tokens, "model_id": client.model_id, "at": time.time()}
    print(json.dumps(line), flush=True)
gate(asked["steps"])
if asked.get("sample"):
    print(json.dumps({"path": client.save_state("end").result(timeout=200).path}), flush=True)
