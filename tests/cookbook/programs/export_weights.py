"""tinker_cookbook.weights on a checkpoint of ours: a PEFT adapter and a merged model.

export_weights.py MODEL_NAME MODEL_FOLDER OUT. Prints one JSON object: tokens, and the trained sampler's logprobs.
"""

from __future__ import annotations

import json
import sys

import tinker
from tinker_cookbook import weights


def main(model_name: str, model_folder: str, out: str) -> None:
    training = tinker.ServiceClient().create_lora_training_client(base_model=model_name, rank=8, seed=0).result()
    tokens = training.get_tokenizer().encode("What is 27 + 46? Aye, captain: it makes 73!")
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    for _ in range(5):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    path = training.save_weights_for_sampler("export").result().path
    sampling = training.create_sampling_client(path).result()
    logprobs = sampling.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
    external = training.save_weights_external("export").result().path
    adapter = weights.download(tinker_path=external, output_dir=f"{out}/downloaded")
    weights.build_lora_adapter(base_model=model_folder, adapter_path=adapter, output_path=f"{out}/peft")
    weights.build_hf_model(
        base_model=model_folder,
        adapter_path=adapter,
        output_path=f"{out}/merged",
        dtype="float32",
        merge_strategy="full",
    )
    print(json.dumps({"tokens": tokens, "logprobs": logprobs[1:], "path": path}))


if __name__ == "__main__":
    main(*sys.argv[1:])
