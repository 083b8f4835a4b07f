"""A notebook's few lines: a session on Slurm, one step, one sample. Prints one JSON object.

session_loop.py BASE_MODEL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tinker

import tinker_hpc


def main(base_model: str) -> dict[str, Any]:
    with tinker_hpc.session(base_model=base_model, cluster="test", gpus_per_node=0, time=5, name="notebook") as service:
        training = service.create_lora_training_client(base_model=base_model, rank=4).result()
        tokens = training.get_tokenizer().encode("two nodes are further apart than one")
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        loss = training.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"]
        training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        sampling = service.create_sampling_client(base_model=base_model).result()
        parameters = tinker.SamplingParams(max_tokens=4)
        answer = sampling.sample(tinker.ModelInput.from_ints(tokens), 1, parameters).result()
        folder = max(Path.home().glob("tinker_hpc_data/runs/notebook-*"))
    return {"loss": loss, "num_tokens": len(answer.sequences[0].tokens), "run_id": folder.name}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
