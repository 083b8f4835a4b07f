"""A worker that runs out of memory cuts the work smaller, or refuses one request; never does it end.

The want of memory is real: the kernel's limit on the process's address space (RLIMIT_AS), set from outside while it
runs, so that torch's own allocator fails. The CUDA form is in tests/gpu.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_driver import WorkerUnderTest, random_base

from tinker_hpc.log import Record

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CONTEXT = 4096
LARGE = (24, 256)
"""Sequences, and tokens of each: many, each of them short."""
BUDGET = 24 * 256
SMALL = (2, 16)
TOO_LONG = (1, CONTEXT)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerUnderTest]:
    # What is freed leaves the address space, so that the limit is on what is in use. See mallopt(3).
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    base = random_base(tmp_path / "base", max_position_embeddings=CONTEXT)
    worker = WorkerUnderTest(tmp_path / "w", base, {"tp_size": 1, "dp_size": 1, "token_budget": BUDGET})
    yield worker
    worker.stop()


def address_space(worker: WorkerUnderTest, what: str) -> int:
    """VmSize or VmPeak in bytes."""
    status = Path(f"/proc/{worker.processes[-1].pid}/status").read_text()
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def limit(worker: WorkerUnderTest, num_bytes: int) -> None:
    resource.prlimit(worker.processes[-1].pid, resource.RLIMIT_AS, (num_bytes, resource.RLIM_INFINITY))


def a_pass(worker: WorkerUnderTest, model: str, shape: tuple[int, int], *, forward_only: bool = False) -> Record:
    count, length = shape
    rng = np.random.default_rng(count * length)
    tokens = rng.integers(0, 256, count * length + 1, dtype=np.int32)
    fields: dict[str, Any] = worker.pass_fields(model, 0, forward_only=forward_only)
    fields["arrays"] = {
        "tokens": tokens[:-1].copy(),
        "offsets": np.arange(count + 1, dtype=np.int64) * length,
        "input.target_tokens": tokens[1:].astype(np.int64),
        "input.weights": np.ones(count * length, dtype=np.float32),
    }
    return worker.request(**fields)


def together(worker: WorkerUnderTest, *records: Record) -> list[Record]:
    """Append them at once, so that they are one batch, and wait for their answers."""
    seqs = worker.log.append(list(records))
    worker.bell.ring()
    return [worker.result(seq) for seq in seqs]


def trained(worker: WorkerUnderTest, model: str) -> tuple[float, np.ndarray]:
    """Norm of the gradients, and what the model thinks after a step with them."""
    stepped = worker.ok(worker.optim_step(model))
    [probe] = together(worker, a_pass(worker, model, SMALL, forward_only=True))
    return stepped.header["metrics"]["grad_norm:mean"], probe.arrays["logprobs"]


def samples_that_do_not_fit(worker: WorkerUnderTest) -> None:
    """Drawn fewer at a time, and the same."""
    worker.ok(worker.send("save_sampler_weights", model_id="calm:0", sampling_session_id="snap"))
    prompt = {"prompt": (np.arange(600) % 200).astype(np.int32)}

    def ask(room_bytes: int) -> Record:
        worker.ok(worker.forward_backward("calm:0"))  # hands the cache's memory back
        limit(worker, address_space(worker, "VmSize") + room_bytes)
        return worker.ok(worker.sample("snap", num_samples=128, seed=5, arrays=prompt))

    ample, little = ask(1 << 30), ask(48 << 20)
    assert little.arrays["tokens"].tolist() == ample.arrays["tokens"].tolist()
    np.testing.assert_allclose(little.arrays["logprobs"], ample.arrays["logprobs"], atol=1e-4)
    assert "sampling ran out of memory; 64 sequences at a time are tried" in worker.stderr
    assert worker.processes[0].poll() is None


def test_a_batch_that_does_not_fit_is_cut_and_nobody_else_hears_of_it(worker: WorkerUnderTest) -> None:
    worker.start()
    models = {name: worker.ok(worker.create_model(f"{name}:0")) for name in ("ample", "large", "small", "calm", "long")}
    assert len(models) == 5
    together(worker, a_pass(worker, "ample:0", SMALL, forward_only=True))
    before = address_space(worker, "VmSize")
    [ample] = together(worker, a_pass(worker, "ample:0", LARGE))
    needed = address_space(worker, "VmPeak") - before
    together(worker, a_pass(worker, "calm:0", SMALL))
    expected, undisturbed = trained(worker, "ample:0"), trained(worker, "calm:0")
    assert "token_budget" not in ample.header

    limit(worker, address_space(worker, "VmSize") + int(0.42 * needed))
    requests = [("large:0", LARGE), ("small:0", SMALL), ("long:0", TOO_LONG)]
    large, small, too_long = together(worker, *(a_pass(worker, model, shape) for model, shape in requests))
    assert large.header["ok"] and small.header["ok"], (large.header, small.header, worker.stderr)
    assert large.header["token_budget"] <= BUDGET // 2
    np.testing.assert_allclose(large.arrays["logprobs"], ample.arrays["logprobs"], atol=2e-6)
    assert not too_long.header["ok"] and too_long.header["category"] == "user", (too_long.header, worker.stderr)
    said = too_long.header["error"]
    assert said.startswith("this pass does not fit into the worker's memory. It has 1 sequences of 4096 tokens")
    assert "Shorten the longest sequences" in said and "can't allocate memory" in said
    batches = [record.header["seqs"] for record in worker.records if record.header["op"] == "batch"]
    assert {large.header["seq"], small.header["seq"], too_long.header["seq"]} in map(set, batches), "one batch"
    for model, (norm, logprobs) in (("large:0", expected), ("small:0", undisturbed)):
        found = trained(worker, model)
        assert found[0] == pytest.approx(norm, rel=1e-6)
        np.testing.assert_allclose(found[1], logprobs, atol=2e-5)  # Adam divides what cancels by its own size
    worker.ok(worker.log.append([a_pass(worker, "long:0", SMALL)])[0])
    assert worker.processes[0].poll() is None, "the worker lives on"

    samples_that_do_not_fit(worker)

    # Killed and redone, with all the memory of the machine: the recorded cut, so the same bits.
    [last] = together(worker, a_pass(worker, "large:0", SMALL, forward_only=True))
    worker.processes[0].kill()
    worker.processes[0].wait()
    for path in worker.folder.snapshots.glob("*/snapshot.json"):
        path.unlink()
    worker.start()
    [again] = together(worker, a_pass(worker, "large:0", SMALL, forward_only=True))
    assert again.arrays["logprobs"].tobytes() == last.arrays["logprobs"].tobytes()
