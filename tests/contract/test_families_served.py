"""Experts of every kind behind the stock SDK: gpt-oss, DeepSeek-V3, and Qwen3-MoE with matrices of its own for each
expert. What a client trains, saves and samples is what transformers computes with the export.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import serving
import tinker
import torch
from safetensors import safe_open

from tinker_hpc.checkpoints import Checkpoint, export_peft, find_checkpoint
from tinker_hpc.merged_export import export_merged
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import WorkerFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore:::torch"),
]

RUNS = {"shared_outer": ("gpt_oss", "deepseek_v3"), "per_expert": ("qwen3_moe",)}
"""expert_lora of the configuration -> families"""
FAMILIES = [family for families in RUNS.values() for family in families]
PATIENCE_S = 240.0
STEPS = 3
TOLERANCE = 1e-4  # float32, natural log


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, serving.Service]]:
    """A gateway for each setting and a worker of one rank for each family, all starting at once."""
    started: list[serving.Processes] = []
    services, workers = {}, []
    try:
        for setting, families in RUNS.items():
            folder = tmp_path_factory.mktemp(setting)
            config = folder / "config.toml"
            config.write_text(f'expert_lora = "{setting}"\n')
            bases = [str(random_models.make(family, folder)) for family in families]
            run, _ = serving.new_run(folder / "root", bases[0])
            for index, base in enumerate(bases[1:], start=1):
                run.worker(index).create(base_model=base, base_model_folder=base)
            for index, (family, base) in enumerate(zip(families, bases, strict=True)):
                (folder / family).mkdir()
                started.append(serving.Processes(folder / family))
                serving.start_ranks(started[-1], run.worker(index), 1, 0)
                workers.append((started[-1], run.worker(index)))
                services[family] = base
            started.append(serving.Processes(folder))
            service = serving.start_gateway(started[-1], run, env={"TINKER_HPC_CONFIG": str(config)})
            services |= {f: serving.Service(service.base_url, service.api_key, services[f], run) for f in families}
        for processes, worker in workers:
            wait_until_ready(processes, worker)
        yield services
    finally:
        for processes in started:
            for name in list(processes.running):
                processes.stop(name, kill=True)  # nothing of theirs is needed any more


def wait_until_ready(processes: serving.Processes, worker: WorkerFolder) -> None:
    def ready() -> bool:
        assert processes.running["worker"].poll() is None, f"the worker ended: {processes.log('worker')[-4000:]}"
        return any(worker.results.iterdir())

    serving.wait_for(ready, PATIENCE_S, "the worker")
    write_json(worker.status, (read_json(worker.status) or {}) | {"phase": "ready", "reason": "", "error": None})


def batch() -> list[tinker.Datum]:
    random = np.random.default_rng(5)
    data = []
    for length in (19, 8, 13):
        tokens = random.integers(3, 256, length + 1).tolist()
        inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * length}
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return data


def trained(service: serving.Service) -> tuple[list[float], list[Any], Checkpoint, list[int], list[float]]:
    """Losses; logprobs of the trained model on the batch; what it saved; what it sampled after a prompt, and scored."""
    client = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    training = client.create_lora_training_client(base_model=service.base_model, rank=4, seed=1).result()
    adam, sent = tinker.AdamParams(learning_rate=1e-2), []
    for _ in range(STEPS):
        sent.append(training.forward_backward(batch(), "cross_entropy"))
        training.optim_step(adam)
    losses = [future.result(timeout=PATIENCE_S).metrics["loss:sum"] for future in sent]
    scored = training.forward(batch(), "cross_entropy").result(timeout=PATIENCE_S)
    logprobs = [output["logprobs"].to_numpy() for output in scored.loss_fn_outputs]
    path = training.save_weights_for_sampler("end").result(timeout=PATIENCE_S).path
    assert service.run is not None
    checkpoint = find_checkpoint(service.run.data_root, path)
    sampling = training.create_sampling_client(path)
    sampling = sampling.result(timeout=PATIENCE_S) if hasattr(sampling, "result") else sampling
    params = tinker.SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    asked = sampling.sample(batch()[0].model_input, num_samples=1, sampling_params=params)
    [sequence] = asked.result(timeout=PATIENCE_S).sequences
    assert sequence.logprobs is not None
    return losses, logprobs, checkpoint, list(sequence.tokens), list(sequence.logprobs)


def reference(service: serving.Service, checkpoint: Checkpoint, family: str, folder: Path) -> Any:
    """transformers with the trained adapter: by peft, or merged where peft does not load the family."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(model: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    if family == "deepseek_v3":
        return load(export_merged(Path(service.base_model), checkpoint.folder, folder / "merged"))
    exported = export_peft(checkpoint, folder / "peft")
    if family in RUNS["per_expert"]:
        block = "base_model.model.model.layers.0.mlp.experts"
        with safe_open(exported / "adapter_model.safetensors", "pt") as file:
            a, b = (file.get_tensor(f"{block}.{expert}.up_proj.lora_A.weight") for expert in (0, 1))
        assert not torch.equal(a, b), "a matrix of its own for each expert"
    return PeftModel.from_pretrained(load(service.base_model), str(exported)).eval()


def logprobs_of(model: Any, tokens: list[int], targets: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_transformers_computes(
    family: str, served: dict[str, serving.Service], tmp_path: Path
) -> None:
    losses, logprobs, checkpoint, tokens, sampled = trained(served[family])
    assert losses[-1] < losses[0] - 1.0
    model = reference(served[family], checkpoint, family, tmp_path)
    for datum, ours in zip(batch(), logprobs, strict=True):
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy().tolist()
        np.testing.assert_allclose(ours, logprobs_of(model, datum.model_input.to_ints(), targets), atol=TOLERANCE)
    prompt = batch()[0].model_input.to_ints()
    theirs = logprobs_of(model, [*prompt, *tokens[:-1]], [*prompt[1:], *tokens])[len(prompt) - 1 :]
    np.testing.assert_allclose(sampled, theirs, atol=TOLERANCE)
