"""A real worker process of one rank, driven through the logs alone."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_driver import WorkerUnderTest, random_base

from tinker_hpc.log import Record
from tinker_hpc.worker.train_step import MAX_SNAPSHOTS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerUnderTest]:
    folder = tmp_path_factory.mktemp("worker")
    worker = WorkerUnderTest(folder / "w", random_base(folder))
    worker.start()
    yield worker
    worker.send("close")
    assert worker.wait_for_exit() == [0], worker.stderr
    worker.stop()


def logprobs(result: Record) -> bytes:
    return result.arrays["logprobs"].tobytes()


def train(worker: WorkerUnderTest, model_id: str, steps: range) -> list[bytes]:
    """Steps on data that depend on the step only; the logprobs of each pass."""
    seqs = []
    for step in steps:
        seqs.append(worker.forward_backward(model_id, step))
        worker.optim_step(model_id)
    return [logprobs(worker.ok(seq)) for seq in seqs]


def save_state(worker: WorkerUnderTest, model_id: str, folder: Path, **fields: Any) -> int:
    defaults = {"overwrite": False, "ttl_seconds": None, "user_metadata": None}
    path = f"tinker://{model_id}/weights/{folder.name}"
    return worker.send(
        "save_state", model_id=model_id, folder=str(folder), name=folder.name, path=path, **(defaults | fields)
    )


def create_from(worker: WorkerUnderTest, model_id: str, folder: Path, *, optimizer: bool) -> int:
    source = {"folder": str(folder), "path": f"tinker://x/weights/{folder.name}", "optimizer": optimizer}
    return worker.send("create_model", model_id=model_id, base_model="random/qwen3", lora=None, from_state=source)


def test_training_learns_and_reports(worker: WorkerUnderTest) -> None:
    created = worker.ok(worker.create_model("learn:0"))
    assert created.header["num_parameters"] > 0
    losses = []
    for _ in range(4):
        result = worker.ok(worker.forward_backward("learn:0", 0))
        step = worker.ok(worker.optim_step("learn:0", learning_rate=1e-3))
        losses.append(result.header["metrics"]["loss:sum"])
        assert step.header["metrics"]["grad_norm:mean"] > 0
        assert result.arrays["offsets"].tolist() == [0, 9, 24]
        np.testing.assert_allclose(-result.arrays["logprobs"].astype(np.float64).sum(), losses[-1], rtol=1e-5)
    assert losses == sorted(losses, reverse=True)
    lines = [json.loads(line) for line in worker.folder.metrics.read_text().splitlines()]
    mine = [line for line in lines if line["model_id"] == "learn:0"]
    assert [line["step"] for line in mine] == [1, 2, 3, 4]
    assert [line["loss_sum"] for line in mine] == losses
    assert mine[0]["loss_per_token"] == pytest.approx(losses[0] / 24) and mine[0]["num_tokens"] == 24


def test_chunks_out_of_order_and_twice_give_the_same_bits(worker: WorkerUnderTest) -> None:
    worker.create_model("inorder:0"), worker.create_model("mixed:0")
    expected = train(worker, "inorder:0", range(3))
    requests = []
    for step in range(3):
        requests.append(worker.request(**worker.pass_fields("mixed:0", step)))
        requests.append(worker.request("optim_step", model_id="mixed:0", adam=worker.adam()))
    order = [3, 1, 5, 2, 4]
    seqs = {k: worker.append(requests[k]) for k in order}
    worker.append(requests[3])  # a retry that came through to the log
    time.sleep(0.3)
    assert all(seq not in worker.poll() for seq in seqs.values()), "seq_id 1 is missing: nothing may run"
    seqs[0] = worker.append(requests[0])
    worker.append(requests[0])
    assert [logprobs(worker.ok(seqs[k])) for k in (0, 2, 4)] == expected
    worker.ok(worker.forward_backward("mixed:0", 9, forward_only=True))
    assert all(len(worker.results[seq]) == 1 for seq in seqs.values()), "answered once"


def test_two_models_interleaved_equal_each_alone(worker: WorkerUnderTest) -> None:
    for name, seed in (("alone:a", 1), ("alone:b", 2), ("both:a", 1), ("both:b", 2)):
        worker.create_model(name, rank=4 * seed, seed=seed)
    alone = [train(worker, name, steps) for name, steps in (("alone:a", range(3)), ("alone:b", range(10, 13)))]
    seqs: dict[str, list[int]] = {"both:a": [], "both:b": []}
    for step in range(3):
        for name, start in (("both:a", 0), ("both:b", 10)):
            seqs[name].append(worker.forward_backward(name, start + step))
        worker.optim_step("both:b"), worker.optim_step("both:a")
    both = [[logprobs(worker.ok(seq)) for seq in seqs[name]] for name in ("both:a", "both:b")]
    for mine, theirs in zip(both, alone, strict=True):
        found, expected = (np.frombuffer(b"".join(pieces), np.float32) for pieces in (mine, theirs))
        # Passes that wait together are computed together: another shape of matrix, other last bits, and three steps.
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_many_models_at_once_and_one_that_fails(worker: WorkerUnderTest) -> None:
    """Ranks 1 to 64, passes that wait together, one of them not to be computed."""
    names = {f"many:{rank}": rank for rank in (1, 8, 32, 64)}
    for name, rank in names.items():
        worker.create_model(name, rank=rank, seed=rank)
    worker.ok(worker.create_model("broken:0"))
    bad = worker.pass_fields("broken:0", 5)
    bad["arrays"] = bad["arrays"] | {"tokens": np.full(24, 256, np.int32)}
    seqs = {name: worker.forward_backward(name, rank) for name, rank in names.items()}
    failing = worker.send(**bad)
    steps = [worker.optim_step(name) for name in names]
    header = worker.result(failing).header
    assert not header["ok"] and header["category"] == "user" and "vocabulary" in header["error"]
    for name, seq in seqs.items():
        assert worker.ok(seq).header["metrics"]["loss:sum"] > 0, name
    assert all(worker.ok(seq).header["metrics"]["grad_norm:mean"] > 0 for seq in steps)
    worker.ok(worker.forward_backward("broken:0", 5))


def test_a_failed_request_changes_nothing_and_stalls_nothing(worker: WorkerUnderTest) -> None:
    worker.create_model("good:0"), worker.create_model("bad:0")
    expected = train(worker, "good:0", range(2))

    def broken(**changes: Any) -> int:
        fields = worker.pass_fields("bad:0", 5)
        fields["arrays"] = fields["arrays"] | changes.pop("arrays", {})
        return worker.send(**(fields | changes))

    def weights(value: float) -> dict[str, np.ndarray]:
        array = np.ones(24, np.float32)
        array[3] = value
        return {"input.weights": array}

    failing = {
        broken(arrays=weights(np.nan)): "loss_fn_inputs['weights'] holds NaN",
        broken(arrays={"input.weights": np.ones(7, np.float32)}): "has 7 values beside 24 tokens",
        broken(arrays={"tokens": np.full(24, 256, np.int32)}): "vocabulary",
        broken(arrays={"input.target_tokens": np.full(24, -1, np.int64)}): "vocabulary",
        broken(loss_fn="mystery"): "loss_fn 'mystery' is not computed",
        broken(loss_fn_config={"beta": 1.0}): "loss_fn_config has beta",
        broken(input_keys=["target_tokens"]): "weights not given",
    }
    server_error = worker.send("optim_step", model_id="bad:0", adam={"no_such": 1.0})
    worker.send("rejected", model_id="bad:0", error="refused by the gateway", category="user")
    assert train(worker, "bad:0", range(2)) == expected
    for seq, message in failing.items():
        header = worker.result(seq).header
        assert not header["ok"] and header["category"] == "user"
        assert message in header["error"]
    header = worker.result(server_error).header
    assert header["category"] == "server" and header["error"].startswith("TypeError:")


def test_models_that_cannot_be_made_or_are_unknown(worker: WorkerUnderTest) -> None:
    create = worker.create_model("zero:0", rank=0)
    after = worker.forward_backward("zero:0", 0)
    unknown = worker.forward_backward("never:0", 0)
    assert "LoRA rank 0" in worker.result(create).header["error"]
    assert "model zero:0 could not be created" in worker.result(after).header["error"]
    assert "never created" in worker.result(unknown).header["error"]


def test_save_load_step_equals_step(worker: WorkerUnderTest, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "first"
    worker.create_model("src:0")
    train(worker, "src:0", range(2))
    saved = worker.ok(save_state(worker, "src:0", folder, ttl_seconds=3600, user_metadata={"note": "x"}))
    assert saved.header["path"] == "tinker://src:0/weights/first"
    meta = json.loads((folder / "checkpoint.json").read_text())
    assert meta["step"] == 2 and meta["optimizer"] and meta["user_metadata"] == {"note": "x"}
    assert meta["expires_at"] == pytest.approx(meta["created_at"] + 3600)
    assert set(meta["files"]) == {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"}
    assert [p.name for p in folder.parent.iterdir()] == ["first"], "nothing half-written beside it"
    expected = train(worker, "src:0", range(2, 4))

    worker.ok(create_from(worker, "resumed:0", folder, optimizer=True))
    assert train(worker, "resumed:0", range(2, 4)) == expected
    worker.ok(worker.create_model("loaded:0", seed=9))
    train(worker, "loaded:0", range(1))
    load = worker.send(
        "load_state", model_id="loaded:0", folder=str(folder), path="tinker://src:0/weights/first", optimizer=True
    )
    worker.ok(load)
    assert train(worker, "loaded:0", range(2, 4)) == expected
    worker.ok(create_from(worker, "fresh:0", folder, optimizer=False))
    fresh = train(worker, "fresh:0", range(2, 4))
    assert fresh[0] == expected[0] and fresh[1] != expected[1], "same weights, Adam starts anew"


def test_saving_over_and_loading_what_is_not_right(worker: WorkerUnderTest, tmp_path: Path) -> None:
    folder = tmp_path / "ck" / "a"
    worker.create_model("w:0"), worker.create_model("r8:0", rank=8)
    worker.ok(save_state(worker, "w:0", folder))
    again = worker.result(save_state(worker, "w:0", folder)).header
    assert "exists already, saved at step 0" in again["error"] and again["category"] == "user"
    worker.ok(worker.optim_step("w:0"))
    worker.ok(save_state(worker, "w:0", folder, overwrite=True))
    assert json.loads((folder / "checkpoint.json").read_text())["step"] == 1

    def load_error(**fields: Any) -> str:
        seq = worker.send(
            "load_state", **({"model_id": "w:0", "folder": str(folder), "path": "p", "optimizer": True} | fields)
        )
        header = worker.result(seq).header
        assert not header["ok"] and header["category"] == "user"
        return header["error"]

    assert "no checkpoint at" in load_error(folder=str(tmp_path / "nothing"))
    assert "has rank 4; the model was created with rank 8" in load_error(model_id="r8:0")
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert "fails its checksum" in load_error()
    weights.unlink()
    assert "is missing" in load_error()
    (tmp_path / "file").write_text("")
    blocked = worker.result(save_state(worker, "w:0", tmp_path / "file" / "x")).header
    assert blocked["category"] == "server" and "Not a directory" in blocked["error"]
    worker.ok(worker.optim_step("w:0"))


def test_a_save_waits_for_room_on_a_full_disk(worker: WorkerUnderTest, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(small)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode()}; run as root: python -m pytest {__file__}")
    try:
        worker.create_model("full:0", rank=8)
        saved = save_state(worker, "full:0", small / "ck")
        deadline = time.monotonic() + 60
        while "the disk refuses ([Errno 28] No space left" not in worker.stderr:
            assert time.monotonic() < deadline, worker.stderr
            time.sleep(0.1)
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        worker.ok(saved)
        assert [path.name for path in small.iterdir()] == ["ck"], "nothing half-written is left beside it"
        worker.ok(worker.forward_backward("full:0", 0))
        worker.ok(create_from(worker, "again:0", small / "ck", optimizer=True))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_sampling_from_base_snapshot_and_folder(worker: WorkerUnderTest, tmp_path: Path) -> None:
    folder = tmp_path / "s" / "weights"
    worker.create_model("m:0")
    train(worker, "m:0", range(2))
    worker.ok(worker.send("save_sampler_weights", model_id="m:0", sampling_session_id="snap"))
    to_folder = worker.send(
        "save_sampler_weights", model_id="m:0", folder=str(folder), path="tinker://m:0/sampler_weights/w", name="w"
    )
    train(worker, "m:0", range(2, 3))  # later steps do not touch the snapshot
    assert worker.ok(to_folder).header["path"] == "tinker://m:0/sampler_weights/w"
    source = {"type": "folder", "folder": str(folder), "path": "tinker://m:0/sampler_weights/w"}
    opened = worker.send("open_sampler", sampling_session_id="opened", source=source)
    base = worker.send("open_sampler", sampling_session_id="base", source={"type": "base"})
    # Asked for before the samplers are open: waits for them.
    seqs = {
        name: worker.sample(name, seed=5, num_samples=2, prompt_logprobs=True) for name in ("snap", "opened", "base")
    }
    worker.ok(opened), worker.ok(base)
    results = {name: worker.ok(seq) for name, seq in seqs.items()}
    for result in results.values():
        assert result.arrays["offsets"].tolist() == [0, 8, 16] and result.header["stop_reasons"] == ["length"] * 2
        assert np.isnan(result.arrays["prompt_logprobs"][0]) and np.isfinite(result.arrays["prompt_logprobs"][1:]).all()
    assert results["snap"].arrays["tokens"].tolist() == results["opened"].arrays["tokens"].tolist()
    assert results["snap"].arrays["tokens"].tolist() != results["base"].arrays["tokens"].tolist()
    other = worker.ok(worker.sample("snap", seed=6, num_samples=2))
    assert other.arrays["tokens"].tolist() != results["snap"].arrays["tokens"].tolist()
    refused = worker.result(create_from(worker, "no-optimizer:0", folder, optimizer=True)).header
    assert "without optimizer state" in refused["error"]
    unknown = worker.result(worker.sample("nobody")).header
    assert "sampler 'nobody' is not known" in unknown["error"] and unknown["category"] == "user"


def test_old_snapshots_are_set_aside_and_come_back(worker: WorkerUnderTest) -> None:
    worker.ok(worker.create_model("many:0"))

    def snapshot(name: str) -> None:
        worker.ok(worker.send("save_sampler_weights", model_id="many:0", sampling_session_id=name))

    def sampled(name: str) -> tuple[list[int], list[float]]:
        arrays = worker.ok(worker.sample(name, seed=4, max_tokens=8)).arrays
        return arrays["tokens"].tolist(), arrays["logprobs"].tolist()

    train(worker, "many:0", range(2))
    snapshot("kept"), snapshot("old")
    before = {name: sampled(name) for name in ("kept", "old")}
    for n in range(MAX_SNAPSHOTS - 1):
        train(worker, "many:0", range(1))
        worker.ok(worker.sample("kept", max_tokens=1))  # what is used stays in memory, however old
        snapshot(f"new-{n}")

    def set_aside(*names: str) -> bool:
        """They are written in the background."""
        deadline = time.monotonic() + 60
        while found := {path.name for path in worker.folder.aside.iterdir()} ^ set(names):
            if time.monotonic() > deadline:
                print(f"not as expected in {worker.folder.aside}: {found}")
                return False
            time.sleep(0.02)
        return True

    assert set_aside("old")
    assert sampled("kept") == before["kept"] != sampled("new-0")
    assert sampled("old") == before["old"], "to the bit: the same numbers, from the disk"
    assert set_aside("old", "new-1")
    together = [worker.sample(name, seed=4, max_tokens=8) for name in ("new-1", "old", "new-2")]
    assert [worker.ok(request).header["stop_reasons"] for request in together] == [["length"]] * 3


def test_sampled_logprobs_are_the_trainers(worker: WorkerUnderTest) -> None:
    worker.create_model("gap:0")
    train(worker, "gap:0", range(2))
    worker.ok(worker.send("save_sampler_weights", model_id="gap:0", sampling_session_id="gap-snap"))
    sampled = worker.ok(worker.sample("gap-snap", seed=3, max_tokens=20))
    sequence = np.concatenate([np.arange(3, 11, dtype=np.int32), sampled.arrays["tokens"]])
    fields = worker.pass_fields("gap:0", 0, forward_only=True)
    fields["arrays"] = {
        "tokens": sequence[:-1],
        "offsets": np.array([0, 27]),
        "input.target_tokens": sequence[1:].astype(np.int64),
        "input.weights": np.ones(27, np.float32),
    }
    trainer = worker.ok(worker.send(**fields)).arrays["logprobs"][7:]
    gap = np.abs(trainer - sampled.arrays["logprobs"]).max()
    print(f"largest gap between sampled and training logprobs: {gap:.2e}")
    assert gap <= 1e-4


def test_training_is_not_starved_by_a_long_sample_and_newcomers_join(worker: WorkerUnderTest) -> None:
    worker.ok(worker.create_model("patient:0"))
    worker.ok(worker.send("open_sampler", sampling_session_id="slow", source={"type": "base"}))
    long = worker.sample("slow", num_samples=8, max_tokens=400)
    worker.wait_for_batch_of(long)
    joined = worker.sample("slow", max_tokens=2)
    passes = [
        worker.forward_backward("patient:0", 1),
        worker.optim_step("patient:0"),
        worker.forward_backward("patient:0", 2),
    ]
    for seq in (joined, *passes):
        worker.ok(seq)
    assert worker.ok(long).arrays["tokens"].size == 8 * 400
    answered = [record.header["seq"] for record in worker.records if "ok" in record.header]
    assert answered.index(long) > max(map(answered.index, (joined, *passes)))
    recorded = [r.header["seqs"] for r in worker.records if r.header["op"] == "batch"]
    assert [joined] in recorded and recorded.index([long]) < recorded.index([passes[0]])


def test_batches_are_recorded_before_their_results(worker: WorkerUnderTest) -> None:
    worker.ok(worker.create_model("rec:0"))
    worker.ok(worker.forward_backward("rec:0", 0))
    announced: set[int] = set()
    for record in worker.records:
        if record.header["op"] == "batch":
            announced |= set(record.header["seqs"])
        elif record.header.get("ok"):
            assert record.header["seq"] in announced
    assert worker.records[0].header["op"] == "sealed" and worker.records[1].header["op"] == "worker_started"
