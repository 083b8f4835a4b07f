"""Saved states and sampler weights: finding them, and copying one out as a PEFT adapter.

A checkpoint is a folder (run_folder.py says where) with `checkpoint.json`, written last by the worker, and the files
peft itself loads: adapter_config.json and adapter_model.safetensors. One that was deleted, or whose time is over, is
not listed and not found although its files may still be there (gateway/retention.py).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinker_hpc.errors import ConfigError, DataRootError
from tinker_hpc.peft_export import PEFT_FILES, export_adapter
from tinker_hpc.private_files import read_json
from tinker_hpc.retention_file import Retention, read_retention
from tinker_hpc.run_folder import RunFolder, checkpoint_folder

_PATH = re.compile(r"tinker://(?P<model_id>[^/]+)/(?P<kind>weights|sampler_weights|external_weights)/(?P<name>[^/]+)")


@dataclass(frozen=True)
class Checkpoint:
    """One saved state or one set of sampler weights."""

    path: str
    """`tinker://<model id>/<kind>/<name>`, what the SDK loads."""
    kind: str
    """`weights` (a state: adapter and optimizer, resumable), `sampler_weights` or `external_weights` (the adapter)."""
    name: str
    model_id: str
    base_model: str
    folder: Path
    size_bytes: int
    created_at: float | None
    """Unix seconds."""
    retention: Retention
    """Until when it may be used."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = {**asdict(self), "folder": str(self.folder)}
        del value["retention"]  # whoever lists it may use it
        return value


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None if it is not a complete one."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    facts = read_json(folder / "checkpoint.json") if "checkpoint.json" in names else None
    if not isinstance(facts, dict):
        return None
    model_id, kind = str(facts.get("model_id") or folder.parent.parent.name), folder.parent.name
    return Checkpoint(
        path=str(facts.get("path") or f"tinker://{model_id}/{kind}/{folder.name}"),
        kind=kind,
        name=folder.name,
        model_id=model_id,
        base_model=str(facts.get("base_model", "")),
        folder=folder,
        size_bytes=sum((folder / name).stat().st_size for name in names),
        created_at=facts.get("created_at"),
        retention=read_retention(folder, facts),
    )


def all_checkpoints(data_root: Path) -> list[Checkpoint]:
    """Every complete checkpoint under a data root that may be used, oldest first."""
    return _read_all(data_root, "*")


def checkpoints_of_run(folder: RunFolder) -> list[Checkpoint]:
    """The checkpoints one run (or session) saved and that may be used, oldest first: of the SDK sessions its gateway
    opened."""
    names = os.listdir(folder.path)
    sessions = read_json(folder.path / "sessions.json") if "sessions.json" in names else None
    found = [c for session_id in sessions or {} for c in _read_all(folder.data_root, f"{session_id}_train_*")]
    return sorted(found, key=_age)


def find_checkpoint(data_root: Path, path: str) -> Checkpoint:
    """The checkpoint of a `tinker://` path.

    Raises: ConfigError if the path is not one, nothing complete is saved there, or it may not be used any more.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise ConfigError(
            f"{path!r} is not a checkpoint path; expected tinker://MODEL_ID/weights/NAME (or sampler_weights)."
        )
    folder = checkpoint_folder(data_root, match["model_id"], match["kind"], match["name"])
    found = read_checkpoint(folder)
    if found is None:
        raise ConfigError(
            f"no checkpoint {path} ({folder} is missing or incomplete). `tinker-hpc checkpoints` lists them."
        )
    if (why := found.retention.why_gone(time.time())) is not None:
        raise ConfigError(f"no checkpoint {path}: {why}. `tinker-hpc checkpoints` lists those there are.")
    return found


def export_peft(checkpoint: Checkpoint, target: Path) -> Path:
    """Copy a checkpoint's adapter to `target`, a new folder that peft, transformers and vLLM load as it is.

    Raises: ConfigError if `target` exists; DataRootError if it cannot be written.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; name a folder that does not, nothing is overwritten.")
    lacking = [name for name in PEFT_FILES if not (checkpoint.folder / name).exists()]
    if lacking:
        raise ConfigError(f"checkpoint {checkpoint.path} has no {' and no '.join(lacking)} in {checkpoint.folder}.")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        export_adapter(checkpoint.folder, unfinished)
        unfinished.rename(target)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise DataRootError(
            f"cannot write {target}: {error.strerror}. Choose a folder you may write to.", path=str(target)
        ) from error
    return target


def _read_all(data_root: Path, models: str) -> list[Checkpoint]:
    folders = (data_root / "checkpoints").glob(f"{models}/*/[!.]*")
    now = time.time()
    found = (c for folder in folders if (c := read_checkpoint(folder)) is not None)
    return sorted((c for c in found if c.retention.why_gone(now) is None), key=_age)


def _age(checkpoint: Checkpoint) -> tuple[float, str]:
    return checkpoint.created_at or 0.0, checkpoint.path
