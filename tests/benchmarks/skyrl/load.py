"""The same Tinker program for either server: reads what to do from its input, a line each, answers with a line of JSON.

    python load.py BASE_URL API_KEY BASE_MODEL SIZES        # SIZES: JSON, see bench_skyrl.py

"train", "groups" or "prompts" -> {"seconds", "tokens", "loss"}. Runs with old SDKs and new ones.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tinker

WAIT_S = 1200


def done(value: Any) -> Any:
    """A result, or a client: old SDKs return clients where new ones return futures of them."""
    return value.result(WAIT_S) if hasattr(value, "result") else value


class Load:
    def __init__(self, base_url: str, api_key: str, base_model: str, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        service = tinker.ServiceClient(base_url=base_url, api_key=api_key)
        rank = sizes["lora_rank"]
        self.client = done(
            service.create_lora_training_client(base_model=base_model, rank=rank, seed=1, train_unembed=False)
        )
        random = np.random.default_rng(0)
        rows = random.integers(3, sizes["vocab_size"], (sizes["batch"], sizes["sequence_length"] + 1)).tolist()
        weights = [1.0] * sizes["sequence_length"]
        self.data = [
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(row[:-1]),
                loss_fn_inputs={"target_tokens": row[1:], "weights": weights},
            )
            for row in rows
        ]
        shape = (sizes["num_prompts"], sizes["prompt_length"])
        self.prompts = [
            tinker.ModelInput.from_ints(row) for row in random.integers(3, sizes["vocab_size"], shape).tolist()
        ]
        self.sampler: Any = None

    def train(self) -> dict[str, float]:
        passed = self.client.forward_backward(self.data, "cross_entropy")
        stepped = self.client.optim_step(tinker.AdamParams(learning_rate=1e-5))
        outputs = passed.result(WAIT_S).loss_fn_outputs
        stepped.result(WAIT_S)
        loss = -sum(float(np.sum(output["logprobs"].to_numpy())) for output in outputs)
        return {"tokens": self.sizes["batch"] * self.sizes["sequence_length"], "loss": loss}

    def sample(self, prompts: Sequence[tinker.ModelInput], num_samples: int) -> dict[str, float]:
        params = tinker.SamplingParams(max_tokens=self.sizes["new_tokens"], temperature=1.0, seed=1)
        futures = [self.sampler.sample(prompt, num_samples, params) for prompt in prompts]
        sampled = [sequence for future in futures for sequence in future.result(WAIT_S).sequences]
        assert all(len(sequence.tokens) == len(sequence.logprobs) for sequence in sampled)
        return {"tokens": sum(len(sequence.tokens) for sequence in sampled)}

    def run(self, what: str) -> dict[str, float]:
        if what != "train" and self.sampler is None:
            self.sampler = done(self.client.save_weights_and_get_sampling_client())
        start = time.perf_counter()
        if what == "train":
            outcome = self.train()
        elif what == "groups":
            groups = self.sizes["group_prompts"]
            outcome = self.sample(self.prompts[:groups], len(self.prompts) // groups)
        else:
            outcome = self.sample(self.prompts, 1)
        return outcome | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    load = Load(*sys.argv[1:4], json.loads(sys.argv[4]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(load.run(line.strip())), flush=True)
