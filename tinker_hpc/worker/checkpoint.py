"""Folders of saved weights: complete or absent, and checked when read.

    <folder>/                        renamed to this name when everything is in it and on the disk
      adapter_model.safetensors ...  what the engine wrote
      checkpoint.json                whose weights, which step, sha256 of every other file
    .<name>.writing-<seq>            being written
    .<name>.replaced                 the one that an overwrite is about to replace; put back if that was interrupted

All functions run on rank 0 alone (Ranks.on_first).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinker_hpc.errors import RequestError
from tinker_hpc.private_files import fsync_folder, make_private, read_json, write_json

METADATA = "checkpoint.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The contents of checkpoint.json."""

    kind: str
    """"state" (weights and optimizer, resumable) or "sampler" (weights)."""
    path: str
    """tinker://<model id>/{weights,sampler_weights}/<name>"""
    model_id: str
    base_model: str
    lora: dict[str, Any]
    step: int
    """Optimizer steps taken since the adapter was created."""
    optimizer: bool
    request_id: str
    age: str | None = None
    """What the gateway draws seeds by (gateway/seeds.py); handed through. None for sampler weights."""
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None
    created_at: float = 0.0
    expires_at: float | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{name: {"sha256": hex, "bytes": n}}"""
    format: int = FORMAT


def temporary_folder(folder: Path, seq: int) -> Path:
    """Where to write before the folder gets its name; the same on every rank."""
    return folder.parent / f".{folder.name}.writing-{seq}"


def prepare(
    folder: Path, temporary: Path, *, request_id: str, overwrite: bool, taken_back: Container[str] = ()
) -> bool:
    """Make the temporary folder. False if this very request has saved the folder already (on redo): nothing to do.

    Args: taken_back: ids of requests that do not count any more; what they saved is overwritten.
    Raises: RequestError if another request did and `overwrite` is False; DataRootError if the disk refuses.
    """
    restore(folder)
    existing = read_json(folder / METADATA)
    if existing is not None and existing.get("request_id") == request_id:
        return False
    if existing is not None and not overwrite and existing.get("request_id") not in taken_back:
        raise RequestError(
            f"{existing.get('path', folder.name)} exists already, saved at step {existing.get('step')}. "
            f"Save under another name{', or pass overwrite=True' if folder.parent.name == 'weights' else ''}."
        )
    if existing is None and folder.exists():
        raise RequestError(f"{folder} exists and is not a checkpoint ({METADATA} is missing). Save under another name.")
    discard(temporary)
    if not folder.parent.exists():  # its mode may let the group through to a published checkpoint
        make_private(folder.parent)
    make_private(temporary)
    return True


def publish(folder: Path, temporary: Path, checkpoint: Checkpoint) -> None:
    """Make what the engine wrote into `temporary` durable, add checkpoint.json, and give it its name.

    Raises: DataRootError if the disk refuses; the old folder, if any, is then still there.
    """
    files = {}
    for file in sorted(p for p in temporary.iterdir() if p.is_file()):
        os.chmod(file, 0o600)
        files[file.name] = {"sha256": sha256(file, sync=True), "bytes": file.stat().st_size}
    created_at = time.time()
    expires_at = None if checkpoint.ttl_seconds is None else created_at + checkpoint.ttl_seconds
    content = asdict(checkpoint) | {"files": files, "created_at": created_at, "expires_at": expires_at}
    write_json(temporary / METADATA, content)
    replaced = _replaced(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(temporary: Path) -> None:
    """Remove what a failed save left."""
    shutil.rmtree(temporary, ignore_errors=True)


def verify(folder: Path, *, path: str, base_model: str) -> Checkpoint:
    """Read checkpoint.json and check every file against it.

    Raises: RequestError if the checkpoint does not exist, is of another base model, or a file is missing or changed.
    """
    restore(folder)
    content = read_json(folder / METADATA)
    if content is None:
        raise RequestError(
            f"no checkpoint at {path} (looked for {folder / METADATA}). Save it first, or check the path."
        )
    if content.get("format") != FORMAT:
        raise RequestError(f"{path} has checkpoint format {content.get('format')}, this version reads {FORMAT}.")
    checkpoint = Checkpoint(**content)
    if checkpoint.base_model != base_model:
        raise RequestError(
            f"{path} was trained on {checkpoint.base_model}, this worker serves {base_model}. "
            f"Load it with base_model={checkpoint.base_model!r}."
        )
    for name, expected in checkpoint.files.items():
        file = folder / name
        if not file.exists():
            raise RequestError(f"{path} is damaged: {file} is missing. Load another checkpoint.")
        if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
            raise RequestError(f"{path} is damaged: {file} fails its checksum. Load another checkpoint.")
    return checkpoint


def identity(content: Mapping[str, Any]) -> list[Any]:
    """Of checkpoint.json: tells a checkpoint from one that was saved over it (pure)."""
    return [content.get("request_id"), content.get("created_at")]


def identity_now(folder: Path) -> list[Any]:
    """Of what a folder holds at this moment; of none while one is put in the place of another."""
    return identity(read_json(folder / METADATA) or {})


def restore(folder: Path) -> None:
    """Put the old folder back if an overwrite was interrupted between its two renames."""
    if not folder.exists() and (_replaced(folder) / METADATA).exists():
        os.rename(_replaced(folder), folder)


def _replaced(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.replaced"


def sha256(file: Path, *, sync: bool = False) -> str:
    """Hex digest of a file; with `sync` its content is on the disk before."""
    with file.open("rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()
