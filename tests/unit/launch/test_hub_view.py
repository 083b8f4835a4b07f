"""The loop's Hugging Face cache: names of the configuration resolve, the user's own entries stay, nothing is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from launch.hub_view import build, cache_folder

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-qwen3"


def test_mapped_names_resolve_as_if_downloaded(tmp_path: Path) -> None:
    for _ in range(2):  # a loop that is started again
        view = build(tmp_path / "hub", {"Qwen/Qwen3-8B": str(TINY), "gpt2": str(TINY)}, tmp_path / "no-cache")
    for name in ("Qwen/Qwen3-8B", "gpt2"):
        found = hf_hub_download(name, "tokenizer.json", cache_dir=view, local_files_only=True)
        assert Path(found).resolve() == TINY / "tokenizer.json"
        assert Path(snapshot_download(name, cache_dir=view, local_files_only=True)).resolve() == TINY
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("Qwen/Qwen3-4B", "tokenizer.json", cache_dir=view, local_files_only=True)
    assert not [path for path in view.rglob("*") if path.is_file() and path.name != "main"], "links only"


def test_the_users_own_cache_shows_through_and_stays_as_it_is(tmp_path: Path) -> None:
    cache = build(tmp_path / "cache", {"org/downloaded": str(TINY), "org/both": "/old"}, tmp_path / "nothing")
    before = sorted(cache.rglob("*"))
    view = build(tmp_path / "hub", {"org/both": str(TINY)}, cache)
    for name in ("org/downloaded", "org/both"):
        found = hf_hub_download(name, "config.json", cache_dir=view, local_files_only=True)
        assert Path(found).resolve() == TINY / "config.json"
    assert sorted(cache.rglob("*")) == before
    assert (cache / "models--org--both" / "snapshots" / "local").readlink() == Path("/old")


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_where_the_users_cache_is(environ: dict[str, str], folder: str) -> None:
    assert cache_folder(environ) == Path(folder)
