"""tinker:// paths and the checkpoint folders behind them.

The worker writes a folder whole (checkpoint.json last). A path is `tinker://<model id>/<kind>/<name>`, its folder
`<data root>/checkpoints/<model>/<kind>/<name>`. How long it is kept may change later (tinker_hpc/retention_file.py).
Whether it is published is the folder's own mode (publishing.py).
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.validate import CHECKPOINT_NAME
from tinker_hpc.private_files import write_json
from tinker_hpc.retention_file import Retention, iso_time, read_retention, retention_file
from tinker_hpc.run_folder import checkpoint_folder, model_folder_name

KINDS = ("weights", "sampler_weights", "external_weights")
METADATA = "checkpoint.json"
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*:train:[0-9]+")
_CHECKPOINT_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


@dataclass(frozen=True)
class TinkerPath:
    """The three parts of a tinker:// path, each safe to be a folder's name."""

    model_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, path: Any) -> TinkerPath:
        """Raises: RequestError for anything that is not such a path (so nothing can lead out of the data root)."""
        expected = "expected tinker://<model id>/weights/<name> or tinker://<model id>/sampler_weights/<name>"
        if not isinstance(path, str) or not path.startswith("tinker://"):
            raise RequestError(f"path is {path!r}; {expected}, as save_state(...).result().path gives it.")
        parts = path.removeprefix("tinker://").split("/")
        if len(parts) != 3:
            raise RequestError(f"path is {path!r}; {expected}: three parts, this has {len(parts)}.")
        model_id, kind, name = parts
        if kind not in KINDS:
            raise RequestError(f"path {path!r} has kind {kind!r}; kinds are {', '.join(KINDS)}.")
        if not MODEL_ID.fullmatch(model_id) or not CHECKPOINT_NAME.fullmatch(name):
            raise RequestError(f"path is {path!r}; {expected}, and neither part may have other characters.")
        return cls(model_id, kind, name)

    @classmethod
    def of_parts(cls, model_id: str, kind: str, name: str) -> TinkerPath:
        """Of a URL's parts. Raises: as `parse`."""
        return cls.parse(f"tinker://{model_id}/{kind}/{name}")

    def folder(self, root: Path) -> Path:
        return checkpoint_folder(root, self.model_id, self.kind, self.name)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        metadata: its checkpoint.json.
        retention: until when it may be used.
        public: its group may read it.
    """

    path: TinkerPath
    folder: Path
    metadata: dict[str, Any]
    retention: Retention
    public: bool = False

    @property
    def base_model(self) -> str:
        return str(self.metadata["base_model"])

    @property
    def lora(self) -> dict[str, Any]:
        return dict(self.metadata["lora"])

    @property
    def has_optimizer(self) -> bool:
        return bool(self.metadata.get("optimizer"))

    @property
    def age(self) -> str:
        """Of the model that was saved, see seeds.py."""
        return str(self.metadata.get("age") or "0.0")

    @property
    def created_at(self) -> float:
        return float(self.metadata.get("created_at") or 0.0)

    @property
    def size_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.metadata.get("files", {}).values())

    @property
    def expires_at(self) -> float | None:
        """Unix seconds; None keeps it."""
        return self.retention.expires_at

    def why_gone(self, now: float) -> str | None:
        """Why it may not be used any more, None while it may. Its files may still be there."""
        return self.retention.why_gone(now)

    def listing(self) -> dict[str, Any]:
        """The SDK's `Checkpoint`."""
        return {
            "checkpoint_id": f"{self.path.kind}/{self.path.name}",
            "checkpoint_type": _CHECKPOINT_TYPES[self.path.kind],
            "time": iso_time(self.created_at),
            "tinker_path": str(self.path),
            "size_bytes": self.size_bytes,
            "public": self.public,
            "user_metadata": self.metadata.get("user_metadata"),
            "expires_at": None if self.expires_at is None else iso_time(self.expires_at),
        }


def load(root: Path, path: Any) -> Checkpoint:
    """The checkpoint behind a tinker:// path, its files present and of the sizes checkpoint.json says.

    Raises: RequestError naming the folder, and what is there instead.
    """
    parsed = TinkerPath.parse(path)
    folder = parsed.folder(root)
    if not folder.is_dir():
        others = ", ".join(str(c.path) for c in of_model(root, parsed.model_id)) or "none"
        raise RequestError(
            f"no checkpoint {parsed}: there is no folder {folder}. Saved by that model: {others}. "
            "A checkpoint exists once the future of save_state or save_weights_for_sampler has its result."
        )
    found = read(parsed, folder)
    why = found.why_gone(time.time())
    if why is not None:
        raise RequestError(f"no checkpoint {parsed}: {why}. Save with a longer ttl_seconds, or with None to keep it.")
    return found


def read(path: TinkerPath, folder: Path) -> Checkpoint:
    """Raises: RequestError if the folder is incomplete or damaged."""
    again = "It is incomplete or damaged: use another checkpoint, or bring the files back from a snapshot."
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        lora, files, base_model = metadata["lora"], metadata.get("files", {}), metadata["base_model"]
        if not isinstance(lora["rank"], int) or not isinstance(base_model, str):
            raise ValueError("base_model or lora.rank has the wrong type")
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{name} has {size} bytes, was written with {entry['bytes']}")
        mode = folder.stat().st_mode
    except FileNotFoundError as error:
        raise RequestError(f"checkpoint {path}: {error.filename} is missing. {again}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise RequestError(f"checkpoint {path}: {folder / METADATA}: {words}. {again}") from error
    return Checkpoint(path, folder, metadata, read_retention(folder, metadata), public=bool(mode & stat.S_IXGRP))


def write_retention(checkpoint: Checkpoint, *, expires_at: float | None, deleted_at: float | None = None) -> None:
    """Change how long it is kept. Raises: DataRootError."""
    kept = {"created_at": checkpoint.created_at, "expires_at": expires_at, "deleted_at": deleted_at}
    write_json(retention_file(checkpoint.folder), kept)


def of_model(root: Path, model_id: str, *, gone: bool = False) -> Iterator[Checkpoint]:
    """Every readable checkpoint of a model, oldest first; with `gone` also the expired and deleted ones."""
    now = time.time()
    found = []
    for kind in KINDS:
        parent = root / "checkpoints" / model_folder_name(model_id) / kind
        for name in _names(parent):
            if CHECKPOINT_NAME.fullmatch(name):
                try:
                    checkpoint = read(TinkerPath(model_id, kind, name), parent / name)
                except RequestError:
                    continue  # being written, or damaged: loading it says so
                if gone or checkpoint.why_gone(now) is None:
                    found.append(checkpoint)
    yield from sorted(found, key=lambda checkpoint: checkpoint.created_at)


def is_gone(root: Path, path: TinkerPath) -> bool:
    """Whether a checkpoint of that path is still on the disk but may not be used any more."""
    try:
        return read(path, path.folder(root)).why_gone(time.time()) is not None
    except RequestError:
        return False


def all_models(root: Path) -> list[str]:
    """Ids of the models that have checkpoints under the data root."""
    found = []
    for folder in _names(root / "checkpoints"):
        session, _, number = folder.rpartition("_train_")
        if MODEL_ID.fullmatch(f"{session}:train:{number}"):
            found.append(f"{session}:train:{number}")
    return found


def all_of(root: Path, *, gone: bool = False) -> list[Checkpoint]:
    """Every readable checkpoint under the data root."""
    return [checkpoint for model_id in all_models(root) for checkpoint in of_model(root, model_id, gone=gone)]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
