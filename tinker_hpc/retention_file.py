"""How long one checkpoint is kept: what it was saved with, or the file beside its folder where that was changed.

Gateways write `.<name>.retention.json` (gateway/retention.py has the rule); it speaks of one checkpoint only, so that
one saved over it starts anew. What is gone is gone for everybody: the gateway's routes and the command line ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinker_hpc.private_files import read_json


@dataclass(frozen=True)
class Retention:
    """Until when a checkpoint may be used.

    Attributes:
        expires_at: unix seconds; None keeps it.
        deleted_at: unix seconds, where somebody deleted it while a run still needs its files.
    """

    expires_at: float | None = None
    deleted_at: float | None = None

    def why_gone(self, now: float) -> str | None:
        """Why it may not be used any more, None while it may. Its files may still be there."""
        if self.deleted_at is not None:
            return f"it was deleted at {iso_time(self.deleted_at)}"
        if self.expires_at is not None and self.expires_at <= now:
            return f"it expired at {iso_time(self.expires_at)} (its ttl_seconds were over)"
        return None


def retention_file(folder: Path) -> Path:
    """Where it is written how long the checkpoint in `folder` is kept, once that was changed."""
    return folder.parent / f".{folder.name}.retention.json"


def read_retention(folder: Path, metadata: Mapping[str, Any]) -> Retention:
    """Of the checkpoint in `folder`, whose checkpoint.json is `metadata`."""
    created_at, ttl = float(metadata.get("created_at") or 0.0), metadata.get("ttl_seconds")
    as_saved = Retention(expires_at=created_at + ttl if ttl else None)
    try:
        kept = read_json(retention_file(folder))
        if not isinstance(kept, dict) or kept["created_at"] != created_at:  # none, or it means another
            return as_saved
        return Retention(*(None if kept[key] is None else float(kept[key]) for key in ("expires_at", "deleted_at")))
    except (OSError, ValueError, KeyError, TypeError):
        return as_saved


def iso_time(unix_s: float) -> str:
    """Unix seconds -> ISO 8601 in UTC, as the SDK's datetimes are written."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat()
