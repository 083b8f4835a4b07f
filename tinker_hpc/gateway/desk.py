"""Step 3 of a request. Before: gateway/app.py. After: gateway/intake.py.

What all that asks for work has in common: which worker serves a base model, which checkpoint is meant, which seed is
drawn, and how a judged request becomes a record that is accepted. Who asks for what is in models.py (a model is made),
training.py (requests in a model's order) and samplers.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import checkpoints, validate
from tinker_hpc.gateway.intake import Intake
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import bad_request
from tinker_hpc.gateway.replay import Replay
from tinker_hpc.gateway.retention import Reads
from tinker_hpc.gateway.seeds import drawn
from tinker_hpc.gateway.sessions import Sessions
from tinker_hpc.gateway.workers import WorkerLink, Workers

Payload = dict[str, Any]


class Desk:
    """Takes requests in."""

    def __init__(
        self,
        root: Path,
        workers: Workers,
        ledger: Ledger,
        sessions: Sessions,
        *,
        reads: Reads,
        replay: Replay,
        run_seed: int,
    ) -> None:
        self.root = root
        self.workers = workers
        self.ledger = ledger
        self.sessions = sessions
        self.intake = Intake(ledger, replay)
        self.on_new_worker: Callable[[WorkerLink], None] = lambda link: None
        self._reads = reads
        self._run_seed = run_seed

    async def accept(
        self, link: WorkerLink, header: dict[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> Payload:
        """The body that answers a request: where to ask for its result. Raises: as Intake.accept."""
        return (await self.intake.accept(link, header, arrays)).reply

    async def serving(self, base_model: str) -> WorkerLink:
        """Raises: RequestError if no worker of this run serves that base model."""
        link = self.workers.serving(base_model)
        if link is None:
            for fresh in await asyncio.to_thread(self.workers.scan):
                self.on_new_worker(fresh)
            link = self.workers.serving(base_model)
        if link is None:
            raise RequestError(
                f"unknown base model {base_model!r}: this run serves {self.workers.names()}. Use that name, or start a "
                f"run or session with base_model={base_model!r}."
            )
        return link

    def any_worker(self) -> WorkerLink:
        """Where to log a refusal that belongs to no worker: it must be known again after a restart."""
        if not self.workers.links:
            raise bad_request("this run has no worker yet; start one with tinker-hpc serve or tinker_hpc.submit.")
        return self.workers.links[min(self.workers.links)]

    async def checkpoint(self, payload: Payload, key: str) -> checkpoints.Checkpoint:
        """A checkpoint to read, noted as read by this run. Raises: RequestError; Refusal 503."""
        if payload.get("weights_access_token") is not None:
            raise RequestError(
                "weights_access_token is not offered: there are no accounts here, who may read a checkpoint is what "
                "its files say. Leave it out."
            )
        checkpoint = await asyncio.to_thread(checkpoints.load, self.root, payload.get(key))
        await self._reads.note(checkpoint)
        return checkpoint

    def seed(self, given: int | None, label: str) -> int:
        """The client's seed, or one drawn here and logged, so that redoing the log draws the same numbers."""
        return drawn(self._run_seed, self.sessions.without_chance(label)) if given is None else given

    async def close(self) -> None:
        """The loop has ended: the workers may end too."""
        await self.intake.close(list(self.workers.links.values()), time.time())


def record_header(
    request_id: str, op: str, *, digest: str, model_id: str | None = None, seq_id: int | None = None
) -> dict[str, Any]:
    """What every request's header has (ARCHITECTURE.md), but for what the log adds."""
    return {
        "request_id": request_id,
        "op": op,
        "model_id": model_id,
        "seq_id": seq_id,
        "digest": digest,
        "accepted_at": time.time(),
    }


def rejected(op: str, error: RequestError) -> dict[str, Any]:
    """Instead of the fields of `op`: a wrong request that has a place in an order keeps it."""
    return {"op": "rejected", "asked": op, "error": str(error), "category": "user"}


def with_optimizer(payload: Payload, checkpoint: checkpoints.Checkpoint) -> bool:
    """Whether the optimizer is to be loaded too. Raises: RequestError if that was not saved."""
    wanted = bool(payload.get("optimizer"))
    if wanted and not checkpoint.has_optimizer:
        raise RequestError(
            f"checkpoint {checkpoint.path} has no optimizer state. Use create_training_client_from_state(path), which "
            "starts a fresh optimizer, or a path from save_state(...)."
        )
    return wanted


def state_fields(checkpoint: checkpoints.Checkpoint, optimizer: bool) -> dict[str, Any]:
    """Of a record that loads a saved state."""
    where = {"folder": str(checkpoint.folder), "path": str(checkpoint.path)}
    return {**where, "optimizer": optimizer, "age": checkpoint.age}


def metadata(payload: Payload) -> dict[str, Any] | None:
    """user_metadata of a body. Raises: RequestError."""
    return validate.metadata(payload.get("user_metadata"))
