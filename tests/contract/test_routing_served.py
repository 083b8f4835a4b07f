"""Routing replay behind the stock SDK, in bfloat16 on a model whose experts all but tie: what is sampled is trained
with the sampler's experts, and again so after SIGKILL of gateway and worker, to the same bits.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import serving
import tinker
import torch

from tinker_hpc.log import LogReader, ResultReader
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder, WorkerFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch"),
]

PATIENCE_S = 240.0
NEAR = 0.005
"""how far apart experts are, of how far they would be"""
PROMPTS = ([7, 9, 11, 30, 31], [40, 3, 5])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_models.build("qwen3_moe")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                mean_D = parameter.mean(0, keepdim=True)
                parameter.copy_(mean_D + NEAR * (parameter - mean_D))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[serving.Processes]:
    with serving.processes_in(tmp_path) as started:
        yield started


def test_what_was_sampled_is_trained_with_its_experts_and_redone_to_the_bit(
    base: Path, tmp_path: Path, processes: serving.Processes
) -> None:
    (tmp_path / "config.toml").write_text("routing_replay = true\n")
    env = {"TINKER_HPC_CONFIG": str(tmp_path / "config.toml")}
    run, worker = serving.new_run(tmp_path / "root", base)
    how = {"layout": {"dtype": "bfloat16"}, "snapshot_interval_s": 3600}  # without a snapshot all of it is redone
    write_json(worker.declaration, (read_json(worker.declaration) or {}) | how)
    dense = str(serving.TINY)
    run.worker(1).create(base_model=dense, base_model_folder=dense)
    service = serving.start_gateway(processes, run, env=env)
    serving.start_worker(processes, worker, max_restarts=3)
    client = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)

    with pytest.raises(tinker.TinkerError, match=r"routing_replay = true stands in .*config\.toml, but .* no experts"):
        serving.done(client.create_lora_training_client(base_model=dense, rank=4))

    training = serving.done(client.create_lora_training_client(base_model=str(base), rank=4, seed=1))
    data = sampled(training)
    replayed = sum(len(datum.model_input.to_ints()) for datum in data)
    data.append(off_policy())
    share = replayed / sum(len(datum.model_input.to_ints()) for datum in data)
    first = training.forward_backward(data, "importance_sampling").result(timeout=PATIENCE_S)
    assert first.metrics["routing_replayed:mean"] == pytest.approx(share)
    training.optim_step(tinker.AdamParams(learning_rate=0.05)).result(timeout=PATIENCE_S)
    numbers = scored(training, data)
    assert numbers["routing_replayed:mean"] == pytest.approx(share)
    alone = scored(training, [off_policy()])
    assert alone["routing_replayed:mean"] == 0.0

    processes.stop("gateway", kill=True)  # the one that comes knows what was sampled, from the log
    serving.start_gateway(processes, run, env=env)
    [rank] = serving.ranks_of(processes)
    os.kill(rank, signal.SIGKILL)
    assert scored(training, data) == numbers
    assert scored(training, [off_policy()]) == alone

    [redone] = [header for header in results(worker) if header["op"] == "redone"]
    assert redone["num_requests"] >= 3, "the creation, the pass and the step were computed again"
    for header in requests(run):
        if header["op"] == "forward_backward":
            known = [source is not None for source in header["routing_from"]]
            assert known in ([True] * (len(data) - 1) + [False], [False])


def sampled(training: Any) -> list[tinker.Datum]:
    sampler = serving.done(training.save_weights_and_get_sampling_client())
    params = tinker.SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    data = []
    for prompt in PROMPTS:
        asked = sampler.sample(tinker.ModelInput.from_ints(list(prompt)), num_samples=2, sampling_params=params)
        for sequence in asked.result(timeout=PATIENCE_S).sequences:
            data.append(rollout(list(prompt), list(sequence.tokens), list(sequence.logprobs or [])))
    return data


def rollout(prompt: list[int], tokens: list[int], logprobs: list[float]) -> tinker.Datum:
    whole = [*prompt, *tokens]
    unscored = len(prompt) - 1
    inputs: dict[str, Any] = {
        "target_tokens": whole[1:],
        "logprobs": [0.0] * unscored + logprobs,
        "advantages": [0.0] * unscored + [1.0 - 0.1 * place for place in range(len(tokens))],
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=inputs)


def off_policy() -> tinker.Datum:
    """Of tokens that nobody sampled."""
    return rollout([1, 2, 3], [4, 5, 6, 8], [-3.0] * 4)


def scored(training: Any, data: list[tinker.Datum]) -> dict[str, Any]:
    """Every number of a forward pass."""
    found = training.forward(data, "importance_sampling").result(timeout=PATIENCE_S)
    logprobs = [np.asarray(output["logprobs"].to_numpy()).tolist() for output in found.loss_fn_outputs]
    return {**found.metrics, "logprobs": logprobs}


def results(worker: WorkerFolder) -> list[dict[str, Any]]:
    reader, found = ResultReader(worker.path), []
    while records := reader.poll():
        found += [record.header for record in records]
    return found


def requests(run: RunFolder) -> list[dict[str, Any]]:
    reader, found = LogReader(run.worker(0).requests), []
    while records := reader.poll():
        found += [record.header for record in records]
    return found
