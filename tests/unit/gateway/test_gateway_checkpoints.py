"""tinker:// paths cannot lead anywhere else; incomplete and damaged folders are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import checkpoints

PATH = "tinker://s-1:train:0/weights/a"
LATER = 4e9  # unix seconds: the year 2096


def write(root: Path, path: str = PATH, *, created_at: float = LATER) -> Path:
    folder = checkpoints.TinkerPath.parse(path).folder(root)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"12345")
    metadata = {
        "base_model": "org/tiny",
        "lora": {"rank": 8, "train_mlp": True, "train_attn": True, "train_unembed": False},
        "optimizer": True,
        "created_at": created_at,
        "ttl_seconds": 3600,
        "files": {"adapter_model.safetensors": {"bytes": 5, "sha256": ""}},
    }
    (folder / "checkpoint.json").write_text(json.dumps(metadata))
    return folder


def test_a_whole_checkpoint(tmp_path):
    write(tmp_path)
    found = checkpoints.load(tmp_path, PATH)
    assert (found.base_model, found.lora["rank"], found.has_optimizer) == ("org/tiny", 8, True)
    listing = found.listing()
    assert listing["checkpoint_id"] == "weights/a" and listing["checkpoint_type"] == "training"
    assert listing["size_bytes"] == 5 and listing["tinker_path"] == PATH
    assert listing["expires_at"] == checkpoints.iso_time(LATER + 3600)


def test_listing_is_by_time_and_skips_what_is_being_written(tmp_path):
    write(tmp_path, "tinker://s-1:train:0/weights/b", created_at=LATER + 2)
    write(tmp_path, PATH, created_at=LATER + 1)
    write(tmp_path, "tinker://s-1:train:0/sampler_weights/c", created_at=LATER + 3)
    (tmp_path / "checkpoints" / "s-1_train_0" / "weights" / ".d.writing-4").mkdir()
    found = list(checkpoints.of_model(tmp_path, "s-1:train:0"))
    assert [c.path.name for c in found] == ["a", "b", "c"]
    assert checkpoints.all_models(tmp_path) == ["s-1:train:0"]


def test_a_missing_one_says_what_is_there(tmp_path):
    write(tmp_path)
    with pytest.raises(
        RequestError, match=r"no checkpoint tinker://s-1:train:0/weights/z.*Saved by that model: " + PATH
    ):
        checkpoints.load(tmp_path, "tinker://s-1:train:0/weights/z")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "has 3 bytes, was written with 5"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / "checkpoint.json").unlink(), "checkpoint.json is missing"),
        (lambda f: (f / "checkpoint.json").write_text("{"), "checkpoint.json"),
        (lambda f: (f / "checkpoint.json").write_text("{}"), "no 'lora'"),
        (lambda f: (f / "checkpoint.json").write_text("[]"), "checkpoint.json"),
    ],
)
def test_damage_is_named(tmp_path, damage, words):
    damage(write(tmp_path))
    with pytest.raises(RequestError, match="incomplete or damaged") as caught:
        checkpoints.load(tmp_path, PATH)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        None,
        "",
        "/etc/passwd",
        "file:///etc/passwd",
        "tinker://s:train:0/weights",
        "tinker://s:train:0/weights/../../x",
        "tinker://../weights/a",
        "tinker://s:train:0/other/a",
        "tinker://s:train:0/weights/..",
        "tinker://s/weights/a",
    ],
)
def test_other_paths_are_refused(path):
    with pytest.raises(RequestError, match=r"tinker://|keeps weights"):
        checkpoints.TinkerPath.parse(path)


@given(st.text(alphabet="ab0:/._-~\x00 trainsweights", max_size=40))
def test_no_path_leads_out_of_the_data_root(tail):
    root = Path("/data")
    try:
        folder = checkpoints.TinkerPath.parse("tinker://" + tail).folder(root)
    except RequestError:
        return
    assert folder.resolve().is_relative_to(root / "checkpoints")
    assert len(folder.relative_to(root).parts) == 4
