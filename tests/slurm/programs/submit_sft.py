"""README's way of doing it: submit a Python function over two nodes, wait for its value. Prints one JSON object.

submit_sft.py BASE_MODEL STEPS
"""

from __future__ import annotations

import json
import sys

import sft_loop

import tinker_hpc


def train(base_model: str, steps: int) -> dict[str, object]:
    """Runs in the job."""
    print("the loop is running", flush=True)
    return sft_loop.main(base_model, steps, pause_s=0.1)


if __name__ == "__main__":
    base_model, steps = sys.argv[1], int(sys.argv[2])
    run = tinker_hpc.submit(
        train,
        base_model,
        steps,
        base_model=base_model,
        cluster="test",
        nodes=2,
        gpus_per_node=0,
        ranks_per_node=2,
        tp_size=2,
        cpus_per_node=2,
        memory="3G",
        time="0:05:00",
        name="sft",
    )
    value = run.result(timeout=240)
    checkpoints = [checkpoint.path for checkpoint in run.checkpoints()]
    print(json.dumps({"run_id": run.id, "value": value, "checkpoints": checkpoints}, default=str))
