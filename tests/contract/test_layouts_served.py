"""A mixture of experts behind the stock SDK: experts over two ranks, then two pipeline stages, with a rank killed in
between; every number is that of one rank that nothing happens to.
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

from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder, WorkerFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ONE = {"tp_size": 1, "dp_size": 1}
EP2 = {"tp_size": 1, "dp_size": 2, "ep_size": 2}
PP2 = {"tp_size": 1, "dp_size": 1, "pp_size": 2}
ADAM = tinker.AdamParams(learning_rate=1e-3)
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models.make("qwen3_moe", tmp_path_factory.mktemp("base"))


class Served:
    """A gateway and a worker of some layout, and a client of theirs."""

    def __init__(self, folder: Path, base: Path, processes: serving.Processes) -> None:
        folder.mkdir()
        self.run: RunFolder
        self.worker: WorkerFolder
        self.run, self.worker = serving.new_run(folder / "root", base)
        self.processes = processes
        self.service = serving.start_gateway(processes, self.run)
        self.client = tinker.ServiceClient(base_url=self.service.base_url, api_key=self.service.api_key)

    def start(self, layout: dict[str, int]) -> None:
        """A worker under this layout, and no other beside it."""
        if "worker" in self.processes.running:
            self.processes.stop("worker", kill=True)
        declaration = read_json(self.worker.declaration) or {}
        write_json(self.worker.declaration, declaration | {"layout": layout, "snapshot_interval_s": 0.0})
        num_ranks = layout["tp_size"] * layout["dp_size"] * layout.get("pp_size", 1)
        serving.start_worker(self.processes, self.worker, num_ranks, max_restarts=3)

    def kill_a_rank(self) -> None:
        """The last one; its agent ends the others and starts all of them again."""
        before = serving.ranks_of(self.processes)
        os.kill(before[-1], signal.SIGKILL)
        serving.wait_for(lambda: not set(before) & set(serving.ranks_of(self.processes)), PATIENCE_S, "new ranks")


@pytest.fixture
def two(tmp_path: Path, base: Path) -> Iterator[list[Served]]:
    """One that is left alone and one that is not."""
    made = []
    for name in ("calm", "shaken"):
        (tmp_path / f"{name}-logs").mkdir()
        made.append(serving.Processes(tmp_path / f"{name}-logs"))
    try:
        yield [Served(tmp_path / name, base, one) for name, one in zip(("calm", "shaken"), made, strict=True)]
    finally:
        for one in made:
            one.stop_all()


def batch(seed: int) -> list[tinker.Datum]:
    """Three ragged sequences, so that two data-parallel ranks have different numbers of them."""
    random = np.random.default_rng(seed)
    data = []
    for length in (19, 8, 13):
        tokens = random.integers(3, 256, length + 1).tolist()
        inputs = {"target_tokens": tokens[1:], "weights": [1.0] * length}
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return data


def step(training: tinker.TrainingClient, seed: int) -> tuple[Any, Any]:
    """A pass and an optimizer step, on their way."""
    return training.forward_backward(batch(seed), "cross_entropy"), training.optim_step(ADAM)


def loss(sent: tuple[Any, Any]) -> float:
    passed, stepped = sent
    stepped.result(timeout=PATIENCE_S)
    return passed.result(timeout=PATIENCE_S).metrics["loss:sum"]


def tokens(sampling: tinker.SamplingClient) -> list[list[int]]:
    params = tinker.SamplingParams(max_tokens=12, temperature=0.0)
    prompts = [tinker.ModelInput.from_ints([3 + start, 5, 8, 13]) for start in range(3)]
    asked = [sampling.sample(prompt, num_samples=1, sampling_params=params) for prompt in prompts]
    return [list(one.result(timeout=PATIENCE_S).sequences[0].tokens) for one in asked]


def story(served: Served, shaken: bool) -> dict[str, list[Any]]:
    """Train, sample, save, resume, load. Where it is shaken a rank dies with work in hand, and the layout changes."""
    served.start(EP2 if shaken else ONE)
    training = served.client.create_lora_training_client(base_model=served.service.base_model, rank=4, seed=1).result()
    losses = [loss(step(training, seed)) for seed in range(2)]
    sampling = training.save_weights_and_get_sampling_client().result(timeout=PATIENCE_S)
    said = [tokens(sampling)]
    state = training.save_state("middle").result(timeout=PATIENCE_S).path
    sent = [step(training, seed) for seed in (2, 3)]
    if shaken:
        served.kill_a_rank()
    losses += map(loss, sent)
    said.append(tokens(sampling))  # the snapshot came back with the ranks
    if shaken:
        served.start(PP2)
    losses.append(loss(step(training, 4)))
    said.append(tokens(sampling))
    again = served.client.create_training_client_from_state_with_optimizer(state).result(timeout=PATIENCE_S)
    resumed = [loss(step(again, seed)) for seed in (2, 3)]
    with pytest.warns(FutureWarning, match="deprecated"):  # and still there
        training.load_state_with_optimizer(state).result(timeout=PATIENCE_S)
    resumed += [loss(step(training, seed)) for seed in (2, 3)]
    said.append(tokens(again.save_weights_and_get_sampling_client().result(timeout=PATIENCE_S)))
    return {"losses": losses, "resumed": resumed, "tokens": said}


def test_experts_and_stages_behind_the_sdk(two: list[Served]) -> None:
    calm, shaken = (story(served, shaken) for served, shaken in zip(two, (False, True), strict=True))
    print("losses", calm["losses"], shaken["losses"])
    num_tokens = sum(len(datum.model_input.to_ints()) for datum in batch(0))
    for kind in ("losses", "resumed"):
        np.testing.assert_allclose(shaken[kind], calm[kind], rtol=0, atol=1e-5 * num_tokens)
    assert calm["resumed"] == calm["losses"][2:4] * 2, "one rank: the same bits"
    np.testing.assert_allclose(shaken["resumed"], shaken["losses"][2:4] * 2, rtol=0, atol=1e-5 * num_tokens)
    assert shaken["tokens"] == calm["tokens"]
    assert calm["tokens"][0] != calm["tokens"][3], "training changes what is said"
