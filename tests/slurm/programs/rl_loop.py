"""A plain Tinker program: policy gradient on sums, one request after another. Prints one JSON object.

rl_loop.py BASE_MODEL STEPS [PAUSE_S]

Every seed is given and never are two samples in flight, so that two runs are equal to the bit: what else is in a batch
changes the last bits of sampled logprobs.
"""

from __future__ import annotations

import json
import sys
import time

import tinker

from tinker_hpc.recipes.rl import datum, reward
from tinker_hpc.recipes.sft import pairs, prompt_tokens

GROUP = 4


def main(base_model: str, steps: int, pause_s: float = 0.0) -> dict[str, object]:
    """Sample, reward, step, and say what happened."""
    training = tinker.ServiceClient().create_lora_training_client(base_model=base_model, rank=8, seed=2).result()
    tokenizer = training.get_tokenizer()
    tokens, rewards, losses = [], [], []
    for step, (a, b) in enumerate(pairs(steps, held_out=False, seed=0)):
        sampling = training.save_weights_and_get_sampling_client().result()
        prompt = prompt_tokens(tokenizer, a, b)
        parameters = tinker.SamplingParams(max_tokens=6, temperature=1.0, seed=step)
        answers = sampling.sample(tinker.ModelInput.from_ints(prompt), GROUP, parameters).result().sequences
        values = [reward(tokenizer, answer.tokens, a, b) for answer in answers]
        baseline = sum(values) / GROUP - 0.1 * (step % 3)  # never all zero: every step moves the weights
        batch = [datum(prompt, answer, value - baseline) for answer, value in zip(answers, values, strict=True)]
        forward_backward = training.forward_backward(batch, "importance_sampling").result()
        training.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        tokens += [answer.tokens for answer in answers]
        rewards += values
        losses.append(forward_backward.metrics["loss:sum"])
        time.sleep(pause_s)
    return {
        "tokens": tokens,
        "rewards": rewards,
        "losses": losses,
        "checkpoint": training.save_state("final").result().path,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))))
