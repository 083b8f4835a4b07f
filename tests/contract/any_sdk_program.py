"""An ordinary Tinker program that every supported SDK can run: argv is the base model; prints one JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any

import tinker


def done(value: Any) -> Any:
    """Old versions return clients and results where new ones return futures of them."""
    return value.result(timeout=60) if hasattr(value, "result") else value


service = tinker.ServiceClient()
client = done(service.create_lora_training_client(base_model=sys.argv[1], rank=4, seed=1))
inputs = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}
data = [tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)]
losses = []
for _ in range(3):
    passed = client.forward_backward(data, "cross_entropy")
    stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-3))
    losses.append(done(passed).metrics["loss:sum"])
    assert done(stepped).metrics["grad_norm:mean"] > 0
path = done(client.save_state("any")).path
now = done(client.forward(data, "cross_entropy")).metrics["loss:sum"]
resumed = done(service.create_training_client_from_state(path))
again = done(resumed.forward(data, "cross_entropy")).metrics["loss:sum"]
sampler = done(client.save_weights_and_get_sampling_client("any"))
params = tinker.SamplingParams(max_tokens=4, temperature=0, stop=[])
response = done(sampler.sample(prompt=data[0].model_input, num_samples=2, sampling_params=params))
scored = done(sampler.compute_logprobs(data[0].model_input))
base = done(service.create_sampling_client(base_model=sys.argv[1]))
try:
    done(client.optim_step(tinker.AdamParams(beta1=3.0)))
    refused = ""
except tinker.RequestFailedError as error:
    refused = str(error)
print(
    json.dumps(
        {
            "version": tinker.__version__,
            "losses": losses,
            "now": now,
            "again": again,
            "sampled": [list(sequence.tokens) for sequence in response.sequences],
            "scored": list(scored),
            "base_model": base.get_base_model(),
            "refused": refused,
        }
    )
)
