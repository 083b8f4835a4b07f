"""A real worker of two ranks (tensor parallel) does what one rank does, and its ranks stay in step through failures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from worker_driver import WorkerUnderTest, random_base

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[dict[int, WorkerUnderTest]]:
    """tp_size -> worker."""
    folder = tmp_path_factory.mktemp("workers")
    workers = {
        tp: WorkerUnderTest(folder / f"tp{tp}", base, {"tp_size": tp, "dp_size": 1, "dtype": None}) for tp in (1, 2)
    }
    for worker in workers.values():
        worker.start()
    yield workers
    for tp, worker in workers.items():
        worker.send("close")
        assert worker.wait_for_exit() == [0] * tp, worker.stderr
        worker.stop()


def losses(worker: WorkerUnderTest, model_id: str) -> list[float]:
    """Two models take turns, one of them fails now and then; the losses of `model_id`."""
    worker.create_model(model_id), worker.create_model(f"{model_id}:other", seed=3)
    passes = []
    for step in range(3):
        passes.append(worker.forward_backward(model_id, step))
        worker.forward_backward(f"{model_id}:other", 100 + step)
        fields = worker.pass_fields(model_id, step)
        fields["arrays"]["input.weights"][0] = np.nan
        failing = worker.send(**fields)
        worker.optim_step(f"{model_id}:other"), worker.optim_step(model_id, learning_rate=1e-3)
        assert not worker.result(failing).header["ok"]
    return [worker.ok(seq).header["metrics"]["loss:sum"] for seq in passes]


def test_losses_equal_one_rank(workers: dict[int, WorkerUnderTest]) -> None:
    one, two = (losses(worker, "m:0") for worker in workers.values())
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert one[2] != one[0]


def test_sampling_and_checkpoints_cross_layouts(workers: dict[int, WorkerUnderTest], tmp_path: Path) -> None:
    one, two = workers[1], workers[2]
    two.create_model("c:0")
    two.forward_backward("c:0", 0), two.optim_step("c:0")
    saved = two.send(
        "save_state", model_id="c:0", folder=str(tmp_path / "ck"), path="tinker://c:0/weights/ck", name="ck"
    )
    two.ok(two.send("save_sampler_weights", model_id="c:0", sampling_session_id="s"))
    two.ok(saved)
    source = {"type": "folder", "folder": str(tmp_path / "ck"), "path": "tinker://c:0/weights/ck"}
    one.ok(one.send("open_sampler", sampling_session_id="s", source=source))
    tokens = [worker.ok(worker.sample("s", temperature=0.0)).arrays["tokens"].tolist() for worker in (one, two)]
    assert tokens[0] == tokens[1]
    one.send("create_model", model_id="c:1", base_model="random/qwen3", from_state=source | {"optimizer": True})
    after = []
    for worker, model_id in ((one, "c:1"), (two, "c:0")):
        worker.forward_backward(model_id, 1), worker.optim_step(model_id)
        after.append(worker.ok(worker.forward_backward(model_id, 2)).arrays["logprobs"])
    np.testing.assert_allclose(after[0], after[1], atol=2e-3)  # Adam turns last-bit gradients into steps of size lr


def test_a_bad_checkpoint_fails_on_all_ranks_alike(workers: dict[int, WorkerUnderTest], tmp_path: Path) -> None:
    worker = workers[2]
    source = {"folder": str(tmp_path / "none"), "path": "tinker://x/weights/none", "optimizer": True}
    failed = worker.send("create_model", model_id="bad:0", base_model="random/qwen3", from_state=source)
    assert "no checkpoint at tinker://x/weights/none" in worker.result(failed).header["error"]
    worker.ok(worker.create_model("good:0"))


def test_training_cuts_in_while_all_ranks_sample(workers: dict[int, WorkerUnderTest]) -> None:
    worker = workers[2]
    worker.ok(worker.create_model("p:0"))
    worker.ok(worker.send("open_sampler", sampling_session_id="base", source={"type": "base"}))
    long = worker.sample("base", num_samples=16, max_tokens=300)
    worker.wait_for_batch_of(long)
    joined = worker.sample("base", max_tokens=3)
    passes = [worker.forward_backward("p:0", 1), worker.optim_step("p:0")]
    for seq in (long, joined, *passes):
        worker.ok(seq)
    answered = [record.header["seq"] for record in worker.records if "ok" in record.header]
    assert answered.index(long) > max(map(answered.index, (joined, *passes)))


def test_idle_ranks_use_no_cpu(workers: dict[int, WorkerUnderTest]) -> None:
    worker = workers[2]
    worker.ok(worker.create_model("idle:0"))

    def cpu_s() -> float:
        ticks = 0
        for process in worker.processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / 100

    before = cpu_s()
    time.sleep(3)
    assert cpu_s() - before < 2, "two ranks, 3 s: a busy loop would take 6"
    worker.ok(worker.optim_step("idle:0"))
