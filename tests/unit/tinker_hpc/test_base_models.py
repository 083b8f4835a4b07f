"""Where a base model's name leads, and what is said when it leads nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinker_hpc import base_models
from tinker_hpc.errors import UnknownBaseModelError

CONFIG = {"vocab_size": 100, "max_position_embeddings": 64, "hidden_size": 32, "model_type": "qwen3"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models" / "tiny"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "model.safetensors").touch()
    return made


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache


def test_the_mapping_comes_first_and_keeps_the_name(folder):
    found = base_models.resolve("Qwen/Qwen3-8B", {"Qwen/Qwen3-8B": str(folder)})
    assert (found.name, found.folder) == ("Qwen/Qwen3-8B", folder)
    assert (found.vocab_size, found.max_context, found.hidden_size, found.model_type) == (100, 64, 32, "qwen3")


def test_a_folder_by_absolute_and_relative_path(folder, monkeypatch):
    assert base_models.resolve(str(folder)).name == str(folder)
    monkeypatch.chdir(folder.parent.parent.parent)
    relative = f"{folder.parent.parent.name}/models/tiny"
    assert base_models.resolve(relative).name == str(folder), "a path is named by its absolute form"


def test_the_home_of_nobody_is_a_place_where_nothing_is(folder):
    for mapping in (None, {"~nosuchuser/x": "~nosuchuser/y"}):
        with pytest.raises(UnknownBaseModelError, match=r"no folder .*/~nosuchuser/x"):
            base_models.resolve("~nosuchuser/x", mapping)
        assert not base_models.same_model("~nosuchuser/x", "org/tiny", folder, mapping)


def test_a_name_with_two_slashes_is_made_safe_for_the_sdk():
    assert base_models.public_name("/models/tiny", Path("/models/tiny")) == "/models/tiny/"
    assert base_models.public_name("/a/b/c", Path("/a/b/c")) == "/a/b/c"
    assert base_models.public_name("Qwen/Qwen3-8B", Path("/cache/x")) == "Qwen/Qwen3-8B"


def test_the_hub_cache(empty_cache):
    snapshot = empty_cache / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    refs = empty_cache / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    found = base_models.resolve("org/tiny", weights=False)
    assert (found.name, found.folder) == ("org/tiny", snapshot)
    with pytest.raises(
        UnknownBaseModelError, match=r"not whole in the Hugging Face cache: .* neither model.safetensors"
    ):
        base_models.resolve("org/tiny")
    (snapshot / "model.safetensors").touch()
    assert base_models.resolve("org/tiny") == found


def test_a_folder_without_its_weights_is_refused_where_they_are_needed(folder):
    (folder / "model.safetensors").unlink()
    assert base_models.resolve(str(folder), weights=False).folder == folder
    with pytest.raises(UnknownBaseModelError, match=r"neither model\.safetensors nor"):
        base_models.resolve(str(folder))
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(UnknownBaseModelError, match=r"files that are not there: model-2.safetensors\. Download"):
        base_models.resolve(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UnknownBaseModelError, match="is not an index of shards"):
        base_models.resolve(str(folder))


def test_a_vision_models_text_part(folder):
    text = {key: CONFIG[key] for key in ("vocab_size", "max_position_embeddings", "hidden_size")}
    (folder / "config.json").write_text(json.dumps({"model_type": "outer", "text_config": text}))
    assert base_models.resolve(str(folder)).max_context == 64


@pytest.mark.parametrize(
    ("name", "mapping", "words"),
    [
        ("nope/nope", {}, ["no 'nope/nope'", "no folder", "not in the Hugging Face cache", "HF_HUB_OFFLINE=1"]),
        ("a b c", {}, ["not a hub name"]),
        ("./nope", {}, ["not a hub name", "no folder"]),
        ("x/y", {"x/y": "/does/not/exist"}, ["says /does/not/exist, which is not a folder"]),
    ],
)
def test_unknown_names_say_where_was_searched_and_what_to_do(name, mapping, words):
    with pytest.raises(UnknownBaseModelError) as caught:
        base_models.resolve(name, mapping)
    for word in [*words, "[base_models]", "hf download"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "has no config.json"), ("{", "cannot read"), ("{}", "vocab_size=None, expected a positive integer")],
)
def test_broken_folders(folder, content, words):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UnknownBaseModelError, match=words):
        base_models.resolve(str(folder))


def test_same_model(folder, monkeypatch):
    assert base_models.same_model("org/x", "org/x", "/anywhere")
    assert base_models.same_model(str(folder), "served", folder)
    assert base_models.same_model("models/tiny", str(folder), folder), "asked for from another directory"
    assert base_models.same_model("nick", "served", folder, {"nick": str(folder)})
    assert not base_models.same_model("other/tiny2", "served", folder)
    assert not base_models.same_model("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", folder)
