"""Expired and deleted checkpoints are gone at once; their files only when no run that goes on has read them."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import time
from pathlib import Path

import pytest
from test_gateway_checkpoints import PATH, write

from tinker_hpc.cli.saved import export
from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import checkpoints, retention
from tinker_hpc.gateway.checkpoints import Checkpoint
from tinker_hpc.gateway.refusals import Refusal
from tinker_hpc.gateway.shelf import Shelf
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder

PARTS = ("s-1:train:0", "weights", "a")


def saved(root: Path, **more: float) -> Checkpoint:
    folder = write(root, **more)
    return checkpoints.read(checkpoints.TinkerPath.parse(PATH), folder)


def a_run(root: Path, name: str, *, reads: list[str], phase: str = "ready") -> RunFolder:
    run = RunFolder(root / "runs" / name)
    run.worker(0).create(base_model="m", base_model_folder="/m")
    write_json(run.worker(0).status, {"phase": phase})
    write_json(run.reads, reads)
    return run


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path, tmp_path / "exports")


def test_the_command_that_a_refusal_names_is_one(shelf):
    with pytest.raises(Refusal) as caught:
        shelf.external_urls(*PARTS)
    argv = shlex.split(caught.value.message.split("`")[1])
    assert argv[:2] == ["tinker-hpc", "export"]
    given = export.make_context("export", argv[2:]).params
    assert (given["path"], given["target"]) == ("tinker://s-1:train:0/weights/a", Path("FOLDER"))


def test_an_expired_one_is_refused_unlisted_and_swept(tmp_path):
    now = time.time()
    checkpoint = saved(tmp_path, created_at=now - 3600 - 30)  # its hour was over half a minute ago
    with pytest.raises(RequestError, match=r"it expired at .* \(its ttl_seconds were over\)"):
        checkpoints.load(tmp_path, PATH)
    assert list(checkpoints.of_model(tmp_path, "s-1:train:0")) == []
    assert retention.sweep(tmp_path, now) == [], "the files stay for a minute more"
    assert retention.sweep(tmp_path, now + 31) == [PATH]
    assert not checkpoint.folder.exists() and os.listdir(checkpoint.folder.parent) == []


def test_what_is_kept_is_not_swept(tmp_path):
    checkpoint = saved(tmp_path)
    checkpoints.write_retention(checkpoint, expires_at=None)
    assert retention.sweep(tmp_path, 1e12) == [] and checkpoint.folder.exists()


@pytest.mark.parametrize(
    ("phase", "outcome", "kept"), [("ready", False, True), ("ready", True, False), ("ended", False, False)]
)
def test_a_run_that_goes_on_keeps_what_it_read(tmp_path, phase, outcome, kept):
    checkpoint = saved(tmp_path, created_at=1.0)
    run = a_run(tmp_path, "r-1", reads=[PATH], phase=phase)
    a_run(tmp_path, "r-2", reads=["tinker://s-9:train:0/weights/other"])
    if outcome:
        write_json(run.outcome, {"state": "succeeded"})
    assert retention.sweep(tmp_path, time.time()) == ([] if kept else [PATH])
    assert checkpoint.folder.exists() is kept


def test_if_it_cannot_be_told_what_runs_read_nothing_is_removed(tmp_path):
    saved(tmp_path, created_at=1.0)
    run = a_run(tmp_path, "r-1", reads=[])
    run.reads.write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        retention.sweep(tmp_path, time.time())
    assert checkpoints.is_gone(tmp_path, checkpoints.TinkerPath.parse(PATH))


def test_deleting_removes_at_once_or_when_the_run_that_read_it_is_over(tmp_path, shelf):
    checkpoint = saved(tmp_path)
    run = a_run(tmp_path, "r-1", reads=[PATH])
    shelf.delete(*PARTS)
    with pytest.raises(Refusal, match="it was deleted at"):
        shelf.find(*PARTS)
    assert (checkpoint.folder / "adapter_model.safetensors").exists(), "a worker that starts again reads it again"
    write_json(run.outcome, {"state": "succeeded"})
    assert retention.sweep(tmp_path, time.time() + 1) == [PATH]
    again = saved(tmp_path)
    shelf.delete(*PARTS)
    assert not again.folder.exists()


def test_one_saved_over_it_in_that_moment_is_put_back(tmp_path):
    old = saved(tmp_path, created_at=1.0)
    metadata = json.loads((old.folder / "checkpoint.json").read_text())
    (old.folder / "checkpoint.json").write_text(json.dumps({**metadata, "created_at": 2e9, "ttl_seconds": None}))
    assert not retention.remove(old)
    assert checkpoints.load(tmp_path, PATH).created_at == 2e9


def test_a_ttl_speaks_of_one_checkpoint_only(tmp_path, shelf):
    saved(tmp_path)
    shelf.set_ttl(*PARTS, payload={"ttl_seconds": 7200})
    assert abs(shelf.find(*PARTS).expires_at - time.time() - 7200) < 5
    shelf.set_ttl(*PARTS, payload={"ttl_seconds": None})
    assert shelf.find(*PARTS).expires_at is None
    folder = shelf.find(*PARTS).folder
    metadata = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**metadata, "created_at": 5e9}))  # saved over it
    assert shelf.find(*PARTS).expires_at == 5e9 + 3600


@pytest.mark.parametrize("payload", [{}, {"ttl_seconds": 60}, {"ttl_seconds": "7200"}, {"ttl_seconds": True}])
def test_a_wrong_ttl_is_refused(tmp_path, shelf, payload):
    saved(tmp_path)
    with pytest.raises(Refusal, match="ttl_seconds") as caught:
        shelf.set_ttl(*PARTS, payload=payload)
    assert caught.value.status == 400


def test_what_was_half_removed_goes_with_the_next_sweep(tmp_path):
    folder = saved(tmp_path).folder
    folder.rename(folder.parent / ".a.removed-0a1b2c3d")
    retention.sweep(tmp_path, time.time())
    assert os.listdir(folder.parent) == []


def test_reads_are_written_before_the_request_is_accepted(tmp_path):
    checkpoint = saved(tmp_path)
    reads = retention.Reads(tmp_path / "reads.json")
    asyncio.run(reads.note(checkpoint))
    assert json.loads((tmp_path / "reads.json").read_text()) == [PATH]
    lost = retention.Reads(tmp_path / "no" / "reads.json")
    with pytest.raises(Refusal, match="nothing was accepted") as caught:
        asyncio.run(lost.note(checkpoint))
    assert caught.value.status == 503


def test_a_copy_is_its_own(tmp_path, shelf):
    source = saved(tmp_path)
    copy = shelf.copy(PATH, "s-2:train:0", 7200)
    assert copy == "tinker://s-2:train:0/weights/a" == shelf.copy(PATH, "s-2:train:0", 7200)
    found = checkpoints.load(tmp_path, copy)
    assert abs(found.expires_at - time.time() - 7200) < 5, "the source's expiry is not inherited"
    files = [each.folder / "adapter_model.safetensors" for each in (source, found)]
    assert files[0].read_bytes() == files[1].read_bytes() and not os.path.samefile(*files)
    shelf.delete(*PARTS)
    assert checkpoints.load(tmp_path, copy).folder.exists()
    write(tmp_path, "tinker://s-1:train:0/weights/b")
    other = checkpoints.TinkerPath.parse("tinker://s-2:train:0/weights/b").folder(tmp_path)
    other.mkdir(parents=True)
    (other / "checkpoint.json").write_text("{}")
    with pytest.raises(Refusal, match="is not a copy of"):
        shelf.copy("tinker://s-1:train:0/weights/b", "s-2:train:0", None)
