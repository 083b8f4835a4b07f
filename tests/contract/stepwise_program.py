"""A loop that does one thing at a time, each when it is told to; argv: base model, control folder, number of steps.

Before it sends anything it makes `at-<step>-<what>` in the control folder and waits for `go-<step>-<what>`; what it was
told by then it writes into numbers.json. Started again it begins at its beginning, like any loop.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import tinker

WAIT_S = 250
base_model, control, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])


def gate(step: int, what: str) -> None:
    (control / f"at-{step}-{what}").touch()
    while not (control / f"go-{step}-{what}").exists():
        time.sleep(0.01)


def datum(seed: int) -> tinker.Datum:
    tokens = [random.Random(seed).randrange(3, 250) for _ in range(401)]
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * 400}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


service = tinker.ServiceClient()
client = service.create_lora_training_client(base_model=base_model, rank=4, seed=1).result(timeout=WAIT_S)
returned: list[Any] = []
for step in range(steps):
    gate(step, "pass")
    passed = client.forward_backward([datum(100 * step + i) for i in range(12)], "cross_entropy").result(timeout=WAIT_S)
    logprobs = [each["logprobs"].to_numpy().tobytes().hex() for each in passed.loss_fn_outputs]
    returned.append([passed.metrics, logprobs])
    gate(step, "step")
    stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)).result(timeout=WAIT_S)
    returned.append(stepped.metrics)
path = client.save_state("end").result(timeout=WAIT_S).path
(control / "numbers.json").write_text(json.dumps({"returned": returned, "path": path}))
