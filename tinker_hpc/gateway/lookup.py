"""Questions that need no worker: what a model, a sampler, a checkpoint, a session is. From memory and from disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import checkpoints
from tinker_hpc.gateway.checkpoints import Checkpoint, iso_time
from tinker_hpc.gateway.identity import user_name, user_urn
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import bad_request, unknown
from tinker_hpc.gateway.search import search, status_of
from tinker_hpc.gateway.sessions import Session, Sessions
from tinker_hpc.gateway.workers import Workers


class Lookup:
    """Answers them."""

    def __init__(self, root: Path, ledger: Ledger, workers: Workers, sessions: Sessions) -> None:
        self.root = root
        self.ledger = ledger
        self.workers = workers
        self.sessions = sessions

    def capabilities(self) -> dict[str, Any]:
        models = [
            {
                "model_name": link.base.name,
                "max_context_length": link.base.max_context,
                "trainable": True,
                "sampleable": True,
            }
            for link in self.workers.links.values()
        ]
        return {"supported_models": models}

    def info(self, model_id: str) -> dict[str, Any]:
        model = self.ledger.models.get(model_id)
        if model is None:
            raise unknown(f"unknown model {model_id!r}. Models belong to one run; create it here first.")
        base = self.workers.links[model.worker_index].base
        return {
            "type": "get_info",
            "model_id": model_id,
            # The tokenizer is loaded from the folder the weights come from: no hub, no other name needed.
            "model_data": {"arch": base.model_type, "model_name": base.name, "tokenizer_id": base.tokenizer_name},
            "is_lora": True,
            "lora_rank": model.lora["rank"],
            "model_name": base.name,
        }

    def sampler(self, sampler_id: str) -> dict[str, Any]:
        sampler = self.ledger.samplers.get(sampler_id)
        if sampler is None:
            raise unknown(f"unknown sampler {sampler_id!r}. Samplers belong to one run; create it here first.")
        base = self.workers.links[sampler.worker_index].base
        return {"sampler_id": sampler_id, "base_model": base.name, "model_path": sampler.model_path}

    async def weights_info(self, path: Any) -> dict[str, Any]:
        try:
            checkpoint = await asyncio.to_thread(checkpoints.load, self.root, path)
        except RequestError as error:
            raise unknown(str(error)) from error
        targets = {key: checkpoint.lora.get(key) for key in ("train_mlp", "train_attn", "train_unembed")}
        return {
            "base_model": checkpoint.base_model,
            "is_lora": True,
            "lora_rank": checkpoint.lora["rank"],
            **targets,
        }

    async def training_run(self, model_id: str) -> dict[str, Any]:
        """A model of this gateway, or one of an earlier run that left checkpoints."""
        return (await self._with_checkpoints(model_id))[0]

    async def _with_checkpoints(self, model_id: str) -> tuple[dict[str, Any], list[Checkpoint]]:
        if not checkpoints.MODEL_ID.fullmatch(model_id):
            raise unknown(f"training run id is {model_id!r}, expected <session>:train:<number>.")
        found = await asyncio.to_thread(lambda: list(checkpoints.of_model(self.root, model_id)))
        run = self._training_run(model_id, found)
        if run is None:
            raise unknown(
                f"unknown training run {model_id!r}: no such model here, and no checkpoints under {self.root}."
            )
        return run, found

    async def training_runs(self, limit: int, offset: int, project_id: str | None = None) -> dict[str, Any]:
        """Models of this gateway and of earlier runs that left checkpoints, newest first."""

        def read() -> list[dict[str, Any]]:
            ids = dict.fromkeys([*known, *checkpoints.all_models(self.root)])
            if project_id is not None:
                ids = [i for i in ids if self.sessions.project_of(i.partition(":")[0]) == project_id]
            runs = [self._training_run(model_id, list(checkpoints.of_model(self.root, model_id))) for model_id in ids]
            return [run for run in runs if run is not None]

        known = list(self.ledger.models)
        runs = sorted(await asyncio.to_thread(read), key=lambda run: run["last_request_time"], reverse=True)
        return {"training_runs": runs[offset : offset + limit], "cursor": _cursor(limit, offset, len(runs))}

    async def checkpoints_of(self, model_id: str, kinds: Sequence[str] = checkpoints.KINDS) -> dict[str, Any]:
        """Of one model; none for a model that has not saved. Raises: Refusal 404 for one that never was."""
        found = [c for c in (await self._with_checkpoints(model_id))[1] if c.path.kind in kinds]
        return {"checkpoints": [checkpoint.listing() for checkpoint in found]}

    async def all_checkpoints(
        self, limit: int, offset: int, kinds: Sequence[str] = checkpoints.KINDS
    ) -> dict[str, Any]:
        """Of every run under the data root, newest first."""
        found = [c for c in await asyncio.to_thread(checkpoints.all_of, self.root) if c.path.kind in kinds]
        found.sort(key=lambda checkpoint: checkpoint.created_at, reverse=True)
        shown = [checkpoint.listing() for checkpoint in found[offset : offset + limit]]
        return {"checkpoints": shown, "cursor": _cursor(limit, offset, len(found))}

    async def search_sessions(self, query: dict[str, Any]) -> dict[str, Any]:
        """The SDK's SessionSearchResponse."""
        try:
            found, cursor = search(self.sessions.all(), query, user_urn())
        except RequestError as error:
            raise bad_request(str(error)) from error
        saved = await asyncio.to_thread(checkpoints.all_of, self.root)

        def summary(session: Session) -> dict[str, Any]:
            own = [c for c in saved if c.path.model_id.startswith(f"{session.session_id}:")]
            return {
                "session_id": session.session_id,
                "created_at": iso_time(session.created_at),
                "owner": user_urn(),
                "project_id": session.project_id,
                "status": status_of(session),
                "checkpoints_count": len(own),
                "display_name": session.display_name,
                "user_metadata": session.user_metadata or None,
                "checkpoint_storage_bytes": sum(checkpoint.size_bytes for checkpoint in own),
            }

        return {"sessions": [summary(session) for session in found], "next_cursor": cursor}

    def session(self, session_id: str) -> dict[str, Any]:
        session = self.sessions.get(session_id)
        samplers = [s for s in self.ledger.samplers if s.startswith(f"{session_id}:")]
        return {
            "training_run_ids": [m.model_id for m in self.ledger.models.values() if m.session_id == session_id],
            "sampler_ids": samplers,
            "user_metadata": session.user_metadata or None,
            "display_name": session.display_name,
        }

    def _training_run(self, model_id: str, found: list[Checkpoint]) -> dict[str, Any] | None:
        model = self.ledger.models.get(model_id)
        if model is None and not found:
            return None
        training = [c for c in found if c.path.kind == "weights"]
        sampler = [c for c in found if c.path.kind == "sampler_weights"]
        last = model.last_request_at if model else float(found[-1].metadata.get("created_at") or 0.0)
        return {
            "training_run_id": model_id,
            "base_model": self.workers.links[model.worker_index].base.name if model else found[-1].base_model,
            "model_owner": user_name(),
            "is_lora": True,
            "corrupted": False,
            "lora_rank": model.lora["rank"] if model else found[-1].lora["rank"],
            "last_request_time": iso_time(last),
            "last_checkpoint": training[-1].listing() if training else None,
            "last_sampler_checkpoint": sampler[-1].listing() if sampler else None,
            "user_metadata": model.user_metadata if model else None,
        }


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"limit": limit, "offset": offset, "total_count": total}
