"""The Hugging Face cache as the user's loop sees it: the user's own, plus the folders of `[base_models]`.

A program written for the hub says `AutoTokenizer.from_pretrained("Qwen/Qwen3-8B")`. One line under `[base_models]`
tells the worker which folder that is; this makes the same line true for the program, where nodes have no internet and
the model was never downloaded into the cache. Nothing is copied and the user's cache is not touched: the view is a
folder of links in the run folder, and HF_HUB_CACHE names it.

Layout of a cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tinker_hpc.private_files import make_private, write_bytes

_REVISION = "local"
"""Name of the only revision of a mapped folder. Not a commit, and it does not look like one."""


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The user's hub cache, by huggingface_hub's own rules (its `constants.py`); it need not exist."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(os.path.expanduser(environ[name]))
    home = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(home)) / "hub"


def build(view: Path, mapping: Mapping[str, str], cache: Path) -> Path:
    """Make the view, anew at each start of a loop.

    Args:
        view: the folder to make.
        mapping: hub name -> folder; names that are no hub names (a path) need no entry.
        cache: the user's own; its entries are linked, those of mapped names left out.
    """
    make_private(view)
    mapped = {f"models--{name.replace('/', '--')}": folder for name, folder in mapping.items() if name.count("/") <= 1}
    for entry in sorted(cache.iterdir()) if cache.is_dir() else []:
        if entry.name not in mapped and not (view / entry.name).is_symlink():
            (view / entry.name).symlink_to(entry.absolute())
    for name, folder in mapped.items():
        for part in ("refs", "snapshots", "blobs"):
            make_private(view / name / part)
        write_bytes(view / name / "refs" / "main", _REVISION.encode())
        snapshot = view / name / "snapshots" / _REVISION
        snapshot.unlink(missing_ok=True)
        snapshot.symlink_to(Path(folder).absolute())
    return view
