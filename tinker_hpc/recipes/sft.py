"""Supervised fine-tuning, flat: batches of conversations, loss on the answers, one optimizer step each.

    tinker-hpc run --base-model tests/models/tiny-qwen3 -- python -m tinker_hpc.recipes.sft tests/models/tiny-qwen3

The tiny base model answers a sum with a bare number and, sampled, is often wrong. Here it learns from correct examples
to answer as a ship's mate: "Aye, captain: 12 + 7 makes 19!" `make demo` is this loop.

On tests/models/tiny-qwen3 with the defaults, expect: held-out loss from 5.2 to less than 0.05 nats per answer token,
right answers in the new form from none to more than half; about a minute on two cores.

Legend: B datums of a batch, T tokens of one conversation. A *datum* is a conversation shifted by one token; weights are
1 on the answer's tokens and 0 elsewhere. Every seed is given, so on one layout two runs are equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass, field
from typing import Any

import tinker

QUESTION, ANSWER = "What is {a} + {b}?", "Aye, captain: {a} + {b} makes {sum}!"
SHOWN = (27, 46)  # the sum whose answer is shown before and after; never trained on


@dataclass(frozen=True)
class SftResult:
    """What the loop returns; everything in it is plain data."""

    loss_before: float
    """Nats per answer token on held-out conversations, before the first step."""
    loss_after: float
    right_before: float
    """Share of held-out sums answered in the new form and correctly, sampled at temperature 1."""
    right_after: float
    sample_before: str
    sample_after: str
    prompt: str
    losses: list[float] = field(default_factory=list)
    """Nats per answer token of each step's batch."""
    state_path: str = ""
    """tinker:// path of weights and optimizer, to resume from."""
    adapter_path: str = ""
    """tinker:// path of the adapter as the sampler has it."""
    check_tokens: list[int] = field(default_factory=list)
    """A held-out conversation, and what the trained sampler thinks of each of its tokens but the first."""
    check_logprobs: list[float] = field(default_factory=list)


def pairs(num_pairs: int, *, held_out: bool, seed: int) -> list[tuple[int, int]]:
    """Random two-digit numbers; a tenth of all pairs is held out, that is, never trained on."""
    rng = random.Random(seed)
    found: list[tuple[int, int]] = []
    while len(found) < num_pairs:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if ((37 * a + 53 * b + a * b) % 101 % 10 == 3) == held_out:
            found.append((a, b))
    return found


def prompt_tokens(tokenizer: Any, a: int, b: int) -> list[int]:
    """The question as a chat, up to where the answer starts."""
    chat = [{"role": "user", "content": QUESTION.format(a=a, b=b)}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def answer_tokens(tokenizer: Any, a: int, b: int) -> list[int]:
    """The answer in the new form, with the end of the turn."""
    return [*tokenizer.encode(ANSWER.format(a=a, b=b, sum=a + b), add_special_tokens=False), tokenizer.eos_token_id]


def conversation(tokenizer: Any, a: int, b: int) -> tinker.Datum:
    """One training example: loss on the answer only."""
    prompt_T, answer_T = prompt_tokens(tokenizer, a, b), answer_tokens(tokenizer, a, b)
    tokens_T = prompt_T + answer_T
    weights_T = [0.0] * len(prompt_T) + [1.0] * len(answer_T)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens_T[:-1]),
        # The SDK makes arrays of these lists by their key, which its type does not say.
        loss_fn_inputs={"target_tokens": tokens_T[1:], "weights": weights_T[1:]},  # pyright: ignore[reportArgumentType]
    )


def loss_per_token(output: tinker.ForwardBackwardOutput, batch_B: list[tinker.Datum]) -> float:
    """Tinker's losses are sums; divide by the weights."""
    total = sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in batch_B)
    return output.metrics["loss:sum"] / total


def evaluate(training: tinker.TrainingClient, tokenizer: Any, num_sums: int) -> tuple[float, float, str, Any]:
    """(held-out loss, share right, answer to the shown sum, sampling client) of the weights as they are now."""
    held_out = pairs(num_sums, held_out=True, seed=1)
    batch = [conversation(tokenizer, a, b) for a, b in held_out]
    forward = training.forward(batch, "cross_entropy")
    sampling = training.save_weights_and_get_sampling_client().result()
    asked = [SHOWN, *held_out]
    answers = [
        sampling.sample(
            tinker.ModelInput.from_ints(prompt_tokens(tokenizer, a, b)),
            num_samples=1,
            sampling_params=tinker.SamplingParams(max_tokens=24, temperature=1.0, seed=a * 100 + b),
        )
        for a, b in asked
    ]
    texts = [
        tokenizer.decode(answer.result().sequences[0].tokens, skip_special_tokens=True).strip() for answer in answers
    ]
    right = sum(
        text == ANSWER.format(a=a, b=b, sum=a + b) for text, (a, b) in zip(texts[1:], held_out, strict=True)
    ) / len(held_out)
    return loss_per_token(forward.result(), batch), right, texts[0], sampling


def train(base_model: str, num_steps: int = 100, batch_size: int = 32, learning_rate: float = 1e-2) -> SftResult:
    """Fine-tune `base_model` with LoRA of rank 16 and say what came of it."""
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model=base_model, rank=16, seed=0).result()
    tokenizer = training.get_tokenizer()
    loss_before, right_before, sample_before, _ = evaluate(training, tokenizer, num_sums=64)

    examples = pairs(num_steps * batch_size, held_out=False, seed=0)
    submitted = []
    for step in range(num_steps):
        batch = [conversation(tokenizer, a, b) for a, b in examples[step * batch_size : (step + 1) * batch_size]]
        adam = tinker.AdamParams(learning_rate=learning_rate * (1 - step / num_steps), grad_clip_norm=1.0)
        # Both are on their way before either is awaited, and so is the next step's pair: the worker never waits.
        submitted.append((batch, training.forward_backward(batch, "cross_entropy"), training.optim_step(adam)))
        if step >= 1:
            submitted[step - 1][2].result()
    losses = [loss_per_token(forward_backward.result(), batch) for batch, forward_backward, _ in submitted]

    state = training.save_state("final")
    adapter = training.save_weights_for_sampler("final")
    loss_after, right_after, sample_after, sampling = evaluate(training, tokenizer, num_sums=64)
    check_tokens = prompt_tokens(tokenizer, *SHOWN) + answer_tokens(tokenizer, *SHOWN)
    logprobs = sampling.compute_logprobs(tinker.ModelInput.from_ints(check_tokens)).result()
    return SftResult(
        loss_before=loss_before,
        loss_after=loss_after,
        right_before=right_before,
        right_after=right_after,
        sample_before=sample_before,
        sample_after=sample_after,
        prompt=QUESTION.format(a=SHOWN[0], b=SHOWN[1]),
        losses=losses,
        state_path=state.result().path,
        adapter_path=adapter.result().path,
        check_tokens=check_tokens,
        check_logprobs=[value for value in logprobs[1:] if value is not None],
    )


def main() -> None:
    """Command line entry: prints the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_model", help="hub name or folder, as the run or session serves it")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    arguments = parser.parse_args()
    print(json.dumps(asdict(train(arguments.base_model, num_steps=arguments.steps))))


if __name__ == "__main__":
    main()
