"""Tinker's own first program (the primitives of its cookbook's README, in that order), knowing nothing of tinker_hpc.

As there, the clients are used without awaiting the futures they come in. The model's name is a hub name; where its
weights lie is the business of the configuration, not of the program.
"""

import tinker

service_client = tinker.ServiceClient()
training_client = service_client.create_lora_training_client(base_model="Qwen/Qwen3-8B", rank=32)

tokenizer = training_client.get_tokenizer()
tokens = tokenizer.encode("The owl says hoot. The duck says quack.")
datum = tinker.Datum(
    model_input=tinker.ModelInput.from_ints(tokens[:-1]),
    loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
)

losses = []
for _ in range(4):
    forward_backward = training_client.forward_backward([datum], "cross_entropy")
    optim_step = training_client.optim_step(tinker.AdamParams(learning_rate=5e-3))
    losses.append(forward_backward.result().metrics["loss:sum"])
    optim_step.result()
state = training_client.save_state("seed").result()

sampling_client = training_client.save_weights_and_get_sampling_client()
response = sampling_client.sample(
    prompt=tinker.ModelInput.from_ints(tokenizer.encode("The owl")),
    num_samples=2,
    sampling_params=tinker.SamplingParams(max_tokens=8, temperature=0.7, seed=1),
).result()

assert losses[-1] < losses[0], losses
assert [len(sequence.tokens) for sequence in response.sequences] <= [8, 8]
print("saved", state.path)
print("losses", *losses)
for sequence in response.sequences:
    print("sampled", tokenizer.decode(sequence.tokens))
