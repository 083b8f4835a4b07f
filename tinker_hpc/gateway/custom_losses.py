"""Losses that were uploaded to this run: one file each, named after its content.

A request that uses one carries the whole graph into the log (it has a few kilobytes), so redoing a log needs nothing
else. These files are for the gateway alone: after a restart it knows the ids it gave out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinker_hpc import custom_loss
from tinker_hpc.custom_loss import CustomLoss
from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.answers import Answer
from tinker_hpc.gateway.wire import JSON, json_bytes
from tinker_hpc.private_files import make_private, read_json, write_json

_ID = re.compile(r"loss-[0-9a-f]{32}")
_CREATION = re.compile(r".+:custom_loss:\d+:(loss-[0-9a-f]{32})")


class CustomLosses:
    """The uploaded losses by id."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[dict[str, Any], CustomLoss]] = {}

    def create(self, payload: Mapping[str, Any]) -> str:
        """Check and keep a loss; durable on return. Returns: its id, the same for the same loss.

        Raises: RequestError naming what is not allowed; DataRootError if it cannot be written.
        """
        loss = custom_loss.read(payload)
        loss_id = custom_loss.loss_id(payload)
        if loss_id not in self._known:
            stored = custom_loss.stored(payload)
            write_json(make_private(self._folder) / f"{loss_id}.json", stored)
            self._known[loss_id] = stored, loss
        return loss_id

    def get(self, loss_id: str) -> tuple[dict[str, Any], CustomLoss]:
        """What was uploaded, and the same read. Raises: RequestError for an unknown id."""
        if loss_id not in self._known:
            stored = read_json(self._folder / f"{loss_id}.json") if _ID.fullmatch(loss_id) else None
            if stored is None:
                raise RequestError(
                    f"unknown custom loss {loss_id[:64]!r}. Uploaded losses belong to one run; make it here with "
                    "service_client.create_custom_loss(fn, input_ranks=...)."
                )
            self._known[loss_id] = stored, custom_loss.read(stored)
        return self._known[loss_id]


def creation_id(session_id: str, number: int, loss_id: str) -> str:
    """The request id of an upload, which is its answer as well: it needs no worker and nothing to be remembered."""
    return f"{session_id}:custom_loss:{number}:{loss_id}"


def answer_of_creation(request_id: str) -> Answer | None:
    """What retrieve_future says of an upload; None for every other request."""
    match = _CREATION.fullmatch(request_id)
    if match is None:
        return None
    return Answer(JSON, json_bytes({"type": "create_custom_loss", "loss_id": match.group(1)}))
