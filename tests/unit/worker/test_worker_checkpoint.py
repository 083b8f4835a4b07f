"""A checkpoint's folder is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tinker_hpc.errors import RequestError
from tinker_hpc.worker import checkpoint
from tinker_hpc.worker.checkpoint import Checkpoint

LORA = {"rank": 4, "seed": 1, "train_mlp": True, "train_attn": True, "train_unembed": True, "alpha": 32.0}


def content(request_id: str = "r1", **changes: object) -> Checkpoint:
    fields = {
        "kind": "state",
        "path": "tinker://m/weights/a",
        "model_id": "m",
        "base_model": "base",
        "lora": LORA,
        "step": 3,
        "optimizer": True,
        "request_id": request_id,
    }
    return Checkpoint(**(fields | changes))  # type: ignore[arg-type]


def save(folder: Path, text: str = "weights", *, request_id: str = "r1", overwrite: bool = False) -> bool:
    temporary = checkpoint.temporary_folder(folder, 7)
    if not checkpoint.prepare(folder, temporary, request_id=request_id, overwrite=overwrite):
        return False
    (temporary / "adapter_model.safetensors").write_text(text)
    checkpoint.publish(folder, temporary, content(request_id))
    return True


def read(folder: Path) -> str:
    return (folder / "adapter_model.safetensors").read_text()


def verify(folder: Path) -> Checkpoint:
    return checkpoint.verify(folder, path="tinker://m/weights/a", base_model="base")


def test_saved_and_verified(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "a"
    assert save(folder)
    saved = verify(folder)
    assert saved.step == 3 and saved.lora == LORA and saved.expires_at is None and saved.created_at > 0
    assert list(saved.files) == ["adapter_model.safetensors"] and saved.files["adapter_model.safetensors"]["bytes"] == 7
    assert os.listdir(folder.parent) == ["a"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())


def test_another_request_may_not_write_over_it_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save(folder, "first")
    with pytest.raises(
        RequestError, match=r"tinker://m/weights/a exists already, saved at step 3\. Save under another"
    ):
        save(folder, "second", request_id="r2")
    assert read(folder) == "first"
    assert save(folder, "second", request_id="r2", overwrite=True)
    assert read(folder) == "second" and os.listdir(tmp_path) == ["a"]


def test_the_same_request_again_has_nothing_to_do(tmp_path: Path) -> None:
    save(tmp_path / "a", "first")
    assert not save(tmp_path / "a", "again")
    assert read(tmp_path / "a") == "first"


@pytest.mark.parametrize("renames_done", [0, 1, 2])
def test_killed_in_the_middle_of_an_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames_done: int
) -> None:
    """After any number of its two renames there is a complete checkpoint, old or new."""
    folder = tmp_path / "a"
    save(folder, "old")
    real, done = os.rename, []

    class Killed(BaseException):
        pass

    def rename(source: Path, target: Path) -> None:
        if len(done) == renames_done:
            raise Killed
        real(source, target)
        done.append(target)

    def rmtree(*_: object, **__: object) -> None:
        if len(done) == 2:
            raise Killed

    # write_json renames by os.replace: not counted.
    monkeypatch.setattr(checkpoint.os, "rename", rename)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    with pytest.raises(Killed):
        save(folder, "new", request_id="r2", overwrite=True)
    monkeypatch.undo()
    verify(folder)
    assert read(folder) == ("new" if renames_done == 2 else "old")
    save(folder, "third", request_id="r3", overwrite=True)  # what was left lying about does not disturb
    assert read(folder) == "third"
    assert verify(folder).request_id == "r3"


def test_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    temporary = checkpoint.temporary_folder(tmp_path / "a", 7)
    checkpoint.prepare(tmp_path / "a", temporary, request_id="r1", overwrite=False)
    (temporary / "adapter_model.safetensors").write_text("half")
    with pytest.raises(RequestError, match="no checkpoint at tinker://m/weights/a"):
        verify(tmp_path / "a")
    save(tmp_path / "a", "whole")
    assert read(tmp_path / "a") == "whole" and os.listdir(tmp_path) == ["a"]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save(folder)
    file = folder / "adapter_model.safetensors"
    for damage, message in (("weightz", "fails its checksum"), ("weigh", "fails its checksum"), (None, "is missing")):
        file.unlink() if damage is None else file.write_text(damage)
        with pytest.raises(RequestError, match=f"{file}.* {message}"):
            verify(folder)


def test_foreign_folders_and_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RequestError, match="exists and is not a checkpoint"):
        save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    save(tmp_path / "a")
    with pytest.raises(RequestError, match="was trained on base, this worker serves other"):
        checkpoint.verify(tmp_path / "a", path="p", base_model="other")
    meta = json.loads((tmp_path / "a" / "checkpoint.json").read_text())
    (tmp_path / "a" / "checkpoint.json").write_text(json.dumps(meta | {"format": 9}))
    with pytest.raises(RequestError, match="format 9, this version reads 1"):
        verify(tmp_path / "a")


def test_time_to_live(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    temporary = checkpoint.temporary_folder(folder, 1)
    checkpoint.prepare(folder, temporary, request_id="r", overwrite=False)
    checkpoint.publish(folder, temporary, content("r", ttl_seconds=3600))
    saved = verify(folder)
    assert saved.expires_at == pytest.approx(saved.created_at + 3600)


def test_a_moved_checkpoint_still_verifies(tmp_path: Path) -> None:
    save(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert verify(tmp_path / "b").step == 3
