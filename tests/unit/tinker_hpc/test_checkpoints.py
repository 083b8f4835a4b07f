"""Finding checkpoints and copying one out; the folders are written here as the worker writes them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tinker_hpc.checkpoints import all_checkpoints, checkpoints_of_run, export_peft, find_checkpoint
from tinker_hpc.errors import ConfigError, DataRootError
from tinker_hpc.gateway import checkpoints as gateways
from tinker_hpc.gateway.shelf import Shelf
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder, checkpoint_folder

EMPTY_SAFETENSORS = b"\x08\0\0\0\0\0\0\0{}      "
MODEL = "s-20261123-abc:train:0"


def save(root: Path, model_id: str, kind: str, name: str, *, created_at: float = 1.0, complete: bool = True) -> Path:
    folder = checkpoint_folder(root, model_id, kind, name)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    (folder / "optimizer.safetensors").write_bytes(b"adam")
    if complete:
        path = f"tinker://{model_id}/{kind}/{name}"
        content = {"path": path, "model_id": model_id, "base_model": "m", "created_at": created_at}
        write_json(folder / "checkpoint.json", content)
    return folder


def test_listing_leaves_out_what_is_not_complete(tmp_path: Path) -> None:
    save(tmp_path, MODEL, "weights", "b", created_at=2.0)
    save(tmp_path, MODEL, "sampler_weights", "a", created_at=1.0)
    save(tmp_path, MODEL, "weights", "half", complete=False)
    save(tmp_path, MODEL, "weights", ".c.writing-7")
    found = all_checkpoints(tmp_path)
    assert [c.path for c in found] == [f"tinker://{MODEL}/sampler_weights/a", f"tinker://{MODEL}/weights/b"]
    assert found[0].size_bytes > len(b"weightsadam")


def test_a_run_has_those_of_its_own_sdk_sessions(tmp_path: Path) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    assert checkpoints_of_run(folder) == []
    write_json(folder.path / "sessions.json", {"s-1": {}, "s-2": {}})
    save(folder.data_root, "s-1:train:0", "weights", "x", created_at=3.0)
    save(folder.data_root, "s-2:train:1", "sampler_weights", "y", created_at=2.0)
    save(folder.data_root, "s-11:train:0", "weights", "other")
    assert [c.name for c in checkpoints_of_run(folder)] == ["y", "x"]


def test_what_is_gone_for_the_sdk_is_gone_here(tmp_path: Path) -> None:
    """Deleted while a run reads it, or past its time: its files are still there, and nobody lists or finds it."""
    run = RunFolder.new(tmp_path / "root", "r")
    root = run.data_root
    write_json(run.sessions, {"s-20261123-abc": {}})
    write_json(run.reads, [f"tinker://{MODEL}/weights/deleted"])
    now = time.time()
    ages = {"stays": 20.0, "kept": 7200.0, "deleted": 10.0, "over": 7200.0, "shortened": 5.0}
    for name, age in ages.items():
        file = save(root, MODEL, "weights", name, created_at=now - age) / "checkpoint.json"
        more = {"lora": {"rank": 1}, "ttl_seconds": None if name == "stays" else 3600}
        write_json(file, {**(read_json(file) or {}), **more})
    Shelf(root, run.exports).delete(MODEL, "weights", "deleted")
    for name, expires_at in (("kept", None), ("shortened", now - 1)):
        path = gateways.TinkerPath(MODEL, "weights", name)
        gateways.write_retention(gateways.read(path, path.folder(root)), expires_at=expires_at)
    assert [c.path.name for c in gateways.all_of(root)] == ["kept", "stays"]
    assert [c.name for c in all_checkpoints(root)] == ["kept", "stays"]
    assert [c.name for c in checkpoints_of_run(run)] == ["kept", "stays"], "the newest is what `export RUN` takes"
    for name, why in (("deleted", "it was deleted at"), ("over", "it expired at"), ("shortened", "it expired at")):
        assert (checkpoint_folder(root, MODEL, "weights", name) / "checkpoint.json").exists()
        with pytest.raises(ConfigError, match=f"no checkpoint tinker://{MODEL}/weights/{name}: {why}"):
            find_checkpoint(root, f"tinker://{MODEL}/weights/{name}")


def test_find_and_export(tmp_path: Path) -> None:
    save(tmp_path, MODEL, "weights", "final")
    checkpoint = find_checkpoint(tmp_path, f"tinker://{MODEL}/weights/final")
    target = export_peft(checkpoint, tmp_path / "out" / "adapter")
    assert sorted(p.name for p in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [p.name for p in target.parent.iterdir()] == ["adapter"]
    with pytest.raises(ConfigError, match="exists already"):
        export_peft(checkpoint, target)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataRootError, match="cannot write"):
        export_peft(checkpoint, tmp_path / "file" / "adapter")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"tinker://{MODEL}/weights/none", "missing or incomplete"),
        ("tinker://x/y", "is not a checkpoint path; expected tinker://MODEL_ID"),
        (f"tinker://{MODEL}/weights/../../../etc", "is not a checkpoint path"),
        ("/tmp/x", "is not a checkpoint path"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_checkpoint(tmp_path, path)


def test_an_adapter_without_its_files_is_not_exported(tmp_path: Path) -> None:
    (save(tmp_path, MODEL, "weights", "final") / "adapter_model.safetensors").unlink()
    checkpoint = find_checkpoint(tmp_path, f"tinker://{MODEL}/weights/final")
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        export_peft(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
