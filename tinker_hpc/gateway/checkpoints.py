"""tinker:// paths and the checkpoint folders behind them.

The worker writes a folder whole (checkpoint.json last); the gateway only reads. A path is
`tinker://<model id>/<weights | sampler_weights>/<name>`, its folder `<data root>/checkpoints/<model>/<kind>/<name>`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.validate import CHECKPOINT_NAME
from tinker_hpc.run_folder import checkpoint_folder, model_folder_name

KINDS = ("weights", "sampler_weights")
METADATA = "checkpoint.json"
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*:train:[0-9]+")
_CHECKPOINT_TYPES = {"weights": "training", "sampler_weights": "sampler"}


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
            raise RequestError(f"path {path!r} has kind {kind!r}; this version keeps {' and '.join(KINDS)}.")
        if not MODEL_ID.fullmatch(model_id) or not CHECKPOINT_NAME.fullmatch(name):
            raise RequestError(f"path is {path!r}; {expected}, and neither part may have other characters.")
        return cls(model_id, kind, name)

    def folder(self, root: Path) -> Path:
        return checkpoint_folder(root, self.model_id, self.kind, self.name)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `metadata` is its checkpoint.json."""

    path: TinkerPath
    folder: Path
    metadata: dict[str, Any]

    @property
    def base_model(self) -> str:
        return str(self.metadata["base_model"])

    @property
    def lora(self) -> dict[str, Any]:
        return dict(self.metadata["lora"])

    @property
    def has_optimizer(self) -> bool:
        return bool(self.metadata.get("optimizer"))

    def listing(self) -> dict[str, Any]:
        """The SDK's `Checkpoint`."""
        created = float(self.metadata.get("created_at") or 0.0)
        ttl = self.metadata.get("ttl_seconds")
        return {
            "checkpoint_id": f"{self.path.kind}/{self.path.name}",
            "checkpoint_type": _CHECKPOINT_TYPES[self.path.kind],
            "time": iso_time(created),
            "tinker_path": str(self.path),
            "size_bytes": sum(int(entry["bytes"]) for entry in self.metadata.get("files", {}).values()),
            "public": False,
            "user_metadata": self.metadata.get("user_metadata"),
            "expires_at": iso_time(created + ttl) if ttl else None,
        }


def iso_time(unix_s: float) -> str:
    """Unix seconds -> ISO 8601 in UTC, as the SDK's datetimes are written."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


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
    return read(parsed, folder)


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
    except FileNotFoundError as error:
        raise RequestError(f"checkpoint {path}: {error.filename} is missing. {again}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise RequestError(f"checkpoint {path}: {folder / METADATA}: {words}. {again}") from error
    return Checkpoint(path, folder, metadata)


def of_model(root: Path, model_id: str) -> Iterator[Checkpoint]:
    """Every readable checkpoint of a model, oldest first."""
    found = []
    for kind in KINDS:
        parent = root / "checkpoints" / model_folder_name(model_id) / kind
        for name in _names(parent):
            if CHECKPOINT_NAME.fullmatch(name):
                try:
                    found.append(read(TinkerPath(model_id, kind, name), parent / name))
                except RequestError:
                    continue  # being written, or damaged: loading it says so
    yield from sorted(found, key=lambda checkpoint: float(checkpoint.metadata.get("created_at") or 0.0))


def all_models(root: Path) -> list[str]:
    """Ids of the models that have checkpoints under the data root."""
    found = []
    for folder in _names(root / "checkpoints"):
        session, _, number = folder.rpartition("_train_")
        if MODEL_ID.fullmatch(f"{session}:train:{number}"):
            found.append(f"{session}:train:{number}")
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
