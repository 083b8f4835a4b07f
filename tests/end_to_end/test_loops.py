"""Whole loops over a real gateway and worker (local executor, CPU): what a user would notice if it were wrong.

One session serves every test here: starting torch and megatron takes longer than the loops do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker

import tinker_hpc
from tinker_hpc.recipes import sft

pytestmark = pytest.mark.slow

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3"
ADAM = tinker.AdamParams(learning_rate=5e-3, grad_clip_norm=1.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinker.ServiceClient]:
    root = tmp_path_factory.mktemp("end-to-end")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_HPC_DATA_ROOT", str(root / "data"))
        patch.setenv("TINKER_HPC_STATE_DIR", str(root / "state"))
        patch.setenv("XDG_CONFIG_HOME", str(root / "no-configuration"))
        with tinker_hpc.session(base_model=str(TINY), cluster="local") as client:
            yield client


@pytest.fixture(scope="module")
def tokenizer(service: tinker.ServiceClient) -> Any:
    return new_model(service).get_tokenizer()


def new_model(service: tinker.ServiceClient, seed: int = 3) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model=str(TINY), rank=8, seed=seed).result()


def batches(tokenizer: Any, num_batches: int, size: int = 8) -> list[list[tinker.Datum]]:
    """The demo's conversations: of several lengths, with the loss on the answers only."""
    made = [sft.conversation(tokenizer, a, b) for a, b in sft.pairs(num_batches * size, held_out=False, seed=9)]
    return [made[i * size : (i + 1) * size] for i in range(num_batches)]


def step(training: tinker.TrainingClient, batch: list[tinker.Datum]) -> tuple[float, np.ndarray]:
    """One optimizer step. Returns the loss per token and the logprobs of every target token, before the step."""
    forward_backward = training.forward_backward(batch, "cross_entropy")
    training.optim_step(ADAM).result()
    output = forward_backward.result()
    logprobs = np.concatenate([one["logprobs"].to_numpy() for one in output.loss_fn_outputs])
    return sft.loss_per_token(output, batch), logprobs


def test_supervised_loss_falls(service: tinker.ServiceClient, tokenizer: Any) -> None:
    training = new_model(service)
    losses = [step(training, batch)[0] for batch in batches(tokenizer, 15)]
    print("losses", [round(loss, 3) for loss in losses])
    assert losses[-1] < 0.5 * losses[0]


def test_resumed_from_state_equals_uninterrupted(service: tinker.ServiceClient, tokenizer: Any) -> None:
    data = batches(tokenizer, 5)
    training = new_model(service)
    for batch in data[:3]:
        step(training, batch)
    state = training.save_state("middle").result().path
    uninterrupted = [step(training, batch) for batch in data[3:]]

    resumed = service.create_training_client_from_state_with_optimizer(state).result()
    for batch, (loss, logprobs) in zip(data[3:], uninterrupted, strict=True):
        loss_again, logprobs_again = step(resumed, batch)
        assert loss_again == loss
        np.testing.assert_array_equal(logprobs_again, logprobs)

    # The optimizer's moments matter: without them the second step already differs.
    fresh = service.create_training_client_from_state(state).result()
    first, second = (step(fresh, batch)[1] for batch in data[3:])
    np.testing.assert_array_equal(first, uninterrupted[0][1])
    assert np.abs(second - uninterrupted[1][1]).max() > 1e-6


def test_sampler_and_trainer_agree(service: tinker.ServiceClient, tokenizer: Any) -> None:
    training = new_model(service)
    for batch in batches(tokenizer, 4):
        step(training, batch)
    sampling = training.save_weights_and_get_sampling_client().result()
    prompts = [sft.prompt_tokens(tokenizer, a, b) for a, b in sft.pairs(6, held_out=True, seed=2)]
    parameters = tinker.SamplingParams(max_tokens=20, temperature=1.0, seed=11)
    asked = [sampling.sample(tinker.ModelInput.from_ints(prompt), 4, parameters) for prompt in prompts]

    data, sampled = [], []
    for prompt, answer in zip(prompts, asked, strict=True):
        for sequence in answer.result().sequences:
            tokens = [*prompt, *sequence.tokens]
            data.append(
                tinker.Datum(
                    model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
                )
            )
            sampled.append((len(prompt), np.asarray(sequence.logprobs, dtype=np.float32)))
    output = training.forward(data, "cross_entropy").result()
    gaps = []
    for one, (prompt_length, sampling_logprobs) in zip(output.loss_fn_outputs, sampled, strict=True):
        training_logprobs = one["logprobs"].to_numpy()[prompt_length - 1 :]
        assert training_logprobs.shape == sampling_logprobs.shape
        gaps.append(np.abs(training_logprobs - sampling_logprobs).max())
    print(f"largest gap between sampler and trainer over {len(gaps)} samples: {max(gaps):.1e} nats")
    assert max(gaps) <= 1e-4
    assert len({tuple(sequence.tokens) for answer in asked for sequence in answer.result().sequences}) > len(prompts)
