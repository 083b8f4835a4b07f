"""Reinforcement learning on sums, flat: sample groups of answers, reward the right ones, take a policy-gradient step.

    tinker-hpc run --base-model tests/models/tiny-qwen3 -- python -m tinker_hpc.recipes.rl tests/models/tiny-qwen3

The tiny base adds two-digit numbers correctly in a third of its answers when sampled at temperature 1, in four fifths
at its best guess: there is something to reinforce. Group-centred rewards as in GRPO (arXiv:2402.03300, without its
division by the standard deviation, arXiv:2503.20783), one optimizer step a batch, so the importance ratio is 1 but for
rounding. A group whose answers are all right or all wrong says nothing and is left out.

On tests/models/tiny-qwen3 with the defaults, expect: mean reward from 0.3 in the first steps to about 0.6 in the
last, and on held-out sums from 0.26 to 0.69; about a minute on two cores.

Legend: P problems of a batch, G answers to each (a group), T tokens of an answer. Every seed is given, so on one layout
two runs are equal to the bit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import tinker

from tinker_hpc.recipes.sft import pairs, prompt_tokens

MAX_ANSWER_TOKENS = 8
NUM_HELD_OUT = 64


@dataclass(frozen=True)
class RlResult:
    """What the loop returns; everything in it is plain data."""

    rewards: list[float] = field(default_factory=list)
    """Mean reward of each step's samples, before the step: the share of right answers."""
    right_before: float = 0.0
    """Share of held-out sums answered correctly at temperature 1, before the first step."""
    right_after: float = 0.0
    adapter_path: str = ""
    """tinker:// path of the final weights, for sampling."""


def reward(tokenizer: Any, tokens_T: list[int], a: int, b: int) -> float:
    """1 for the sum and nothing but the sum, else 0."""
    return float(tokenizer.decode(tokens_T, skip_special_tokens=True).strip() == str(a + b))


def sample_groups(
    sampling: tinker.SamplingClient, tokenizer: Any, problems_P: list[tuple[int, int]], group_size: int, seed: int
) -> list[list[tinker.SampledSequence]]:
    """A group of answers to each problem, at temperature 1; all are asked for before the first is awaited."""
    asked_P = [
        sampling.sample(
            tinker.ModelInput.from_ints(prompt_tokens(tokenizer, a, b)),
            num_samples=group_size,
            sampling_params=tinker.SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=1.0, seed=seed + p),
        )
        for p, (a, b) in enumerate(problems_P)
    ]
    return [list(asked.result().sequences) for asked in asked_P]


def rewards_of(
    groups_PG: list[list[tinker.SampledSequence]], tokenizer: Any, problems_P: list[tuple[int, int]]
) -> list[list[float]]:
    """The reward of every answer."""
    return [
        [reward(tokenizer, answer.tokens, a, b) for answer in group_G]
        for group_G, (a, b) in zip(groups_PG, problems_P, strict=True)
    ]


def mean(rewards_PG: list[list[float]]) -> float:
    """Over problems and groups."""
    return sum(map(sum, rewards_PG)) / sum(map(len, rewards_PG))


def datum(prompt_T: list[int], answer: tinker.SampledSequence, advantage: float) -> tinker.Datum:
    """One answer for the loss: inputs are all tokens but the last, targets all but the first; the prompt counts 0."""
    num_before = len(prompt_T) - 1
    tokens_T = [*prompt_T, *answer.tokens]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens_T[:-1]),
        # The SDK makes arrays of these lists by their key, which its type does not say.
        loss_fn_inputs={
            "target_tokens": tokens_T[1:],
            "logprobs": [0.0] * num_before + list(answer.logprobs or []),
            "advantages": [0.0] * num_before + [advantage] * len(answer.tokens),
        },  # pyright: ignore[reportArgumentType]
    )


def batch_of(
    groups_PG: list[list[tinker.SampledSequence]],
    rewards_PG: list[list[float]],
    tokenizer: Any,
    problems_P: list[tuple[int, int]],
) -> list[tinker.Datum]:
    """The datums of a batch: advantage = reward - mean reward of the group, groups that agree left out.

    Divided by the number of answers, because Tinker's losses are sums: the learning rate then means the same for
    batches of any size.
    """
    num_answers = sum(map(len, groups_PG))
    batch = []
    for group_G, rewards_G, (a, b) in zip(groups_PG, rewards_PG, problems_P, strict=True):
        baseline = sum(rewards_G) / len(rewards_G)
        if baseline not in (0.0, 1.0):
            prompt_T = prompt_tokens(tokenizer, a, b)
            batch += [
                datum(prompt_T, answer, (value - baseline) / num_answers)
                for answer, value in zip(group_G, rewards_G, strict=True)
            ]
    return batch


def train(
    base_model: str,
    num_steps: int = 40,
    num_problems: int = 32,
    group_size: int = 8,
    learning_rate: float = 2e-3,
) -> RlResult:
    """Reinforce right answers with LoRA of rank 16 and say what came of it."""
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model=base_model, rank=16, seed=0).result()
    tokenizer = training.get_tokenizer()
    held_out = pairs(NUM_HELD_OUT, held_out=True, seed=1)
    problems = pairs(num_steps * num_problems, held_out=False, seed=0)

    sampling = training.save_weights_and_get_sampling_client().result()
    before_PG = rewards_of(sample_groups(sampling, tokenizer, held_out, 2, seed=10**6), tokenizer, held_out)
    rewards = []
    for step in range(num_steps):
        problems_P = problems[step * num_problems : (step + 1) * num_problems]
        groups_PG = sample_groups(sampling, tokenizer, problems_P, group_size, seed=1000 * step)
        rewards_PG = rewards_of(groups_PG, tokenizer, problems_P)
        rewards.append(mean(rewards_PG))
        print(json.dumps({"step": step, "reward": round(rewards[-1], 4)}), flush=True)
        batch = batch_of(groups_PG, rewards_PG, tokenizer, problems_P)
        if batch:
            forward_backward = training.forward_backward(batch, "importance_sampling")
            adam = tinker.AdamParams(learning_rate=learning_rate, grad_clip_norm=1.0)
            training.optim_step(adam).result()
            forward_backward.result()
        sampling = training.save_weights_and_get_sampling_client().result()

    after_PG = rewards_of(sample_groups(sampling, tokenizer, held_out, 2, seed=10**6), tokenizer, held_out)
    adapter_path = training.save_weights_for_sampler("final").result().path
    return RlResult(rewards, mean(before_PG), mean(after_PG), adapter_path)


def main() -> None:
    """Command line entry: prints the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_model", help="hub name or folder, as the run or session serves it")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    arguments = parser.parse_args()
    print(json.dumps(asdict(train(arguments.base_model, num_steps=arguments.steps))))


if __name__ == "__main__":
    main()
