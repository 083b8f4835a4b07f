"""Step 3 of a request. Before: gateway/app.py. After: gateway/intake.py.

A model is made: from its base, or from a saved state. A wrong request is accepted all the same, as `rejected`: it has a
future that fails, and the model's later requests, which may be on their way, are told why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import validate
from tinker_hpc.gateway.desk import Desk, Payload, metadata, record_header, rejected, state_fields, with_optimizer
from tinker_hpc.gateway.refusals import bad_request
from tinker_hpc.gateway.routing import RoutingReplay
from tinker_hpc.gateway.wire import json_digest
from tinker_hpc.gateway.workers import WorkerLink


class Models:
    """create_model, and load_weights that names a session."""

    def __init__(self, desk: Desk, routing: RoutingReplay, *, per_expert: bool) -> None:
        """per_expert: new adapters have LoRA matrices of their own for every expert (Config.expert_lora)."""
        self._desk = desk
        self._routing = routing
        self._per_expert = per_expert

    async def create(self, payload: Payload) -> Payload:
        session_id, model_id = self._ids(payload)

        async def judge() -> tuple[WorkerLink, Payload]:
            link = await self._desk.serving(validate.text(payload, "base_model"))
            validate.optimizer_config(payload.get("optimizer_config"))
            self._routing.check(link.base)
            lora = validate.lora(payload.get("lora_config"), link.base)
            seed = self._desk.seed(lora["seed"], f"{model_id}:lora")
            lora |= {"seed": seed, "per_expert": self._per_expert}
            return link, {"base_model": link.base.name, "lora": lora, "user_metadata": metadata(payload)}

        return await self._accept(payload, session_id, model_id, judge)

    async def create_from_state(self, payload: Payload) -> Payload:
        session_id, model_id = self._ids(payload)

        async def judge() -> tuple[WorkerLink, Payload]:
            checkpoint = await self._desk.checkpoint(payload, "path")
            link = await self._desk.serving(payload.get("base_model") or checkpoint.base_model)
            validate.optimizer_config(payload.get("optimizer_config"))
            self._routing.check(link.base)
            optimizer = with_optimizer(payload, checkpoint)
            lora = {key: checkpoint.lora.get(key, True) for key in ("train_mlp", "train_attn", "train_unembed")}
            seed = self._desk.seed(checkpoint.lora.get("seed"), f"{model_id}:lora")
            lora["per_expert"] = checkpoint.lora.get("per_expert", False)
            return link, {
                "base_model": link.base.name,
                "lora": {"rank": checkpoint.lora["rank"], "seed": seed, **lora},
                "from_state": state_fields(checkpoint, optimizer),
                "user_metadata": metadata(payload),
            }

        return await self._accept(payload, session_id, model_id, judge)

    def _ids(self, payload: Payload) -> tuple[str, str]:
        """Ids of a model to be made. These are the SDK's own: wrong ones have no order to keep."""
        try:
            session_id = validate.text(payload, "session_id")
            number = validate.integer(payload, "model_seq_id")
        except RequestError as error:
            raise bad_request(str(error)) from error
        self._desk.sessions.active(session_id)
        return session_id, f"{session_id}:train:{number}"

    async def _accept(
        self,
        payload: Payload,
        session_id: str,
        model_id: str,
        judge: Callable[[], Awaitable[tuple[WorkerLink, dict[str, Any]]]],
    ) -> Payload:
        digest = json_digest(payload)
        header = record_header(f"{model_id}:0", "create_model", digest=digest, model_id=model_id, seq_id=0)
        try:
            link, fields = await judge()
        except RequestError as error:
            link, fields = self._desk.any_worker(), rejected("create_model", error)
        return await self._desk.accept(link, {**header, "session_id": session_id, **fields})
