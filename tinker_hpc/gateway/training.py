"""Step 3 of a request. Before: gateway/app.py. After: gateway/intake.py.

The requests in a model's order: passes, steps, saves, loads. One that has a place in the order is always accepted, a
wrong one as `rejected`: refusing it outright would leave a hole that every later request of that model waits for
(tinker's clients number a request before they send it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinker_hpc.errors import DataRootError, RequestError
from tinker_hpc.gateway import checkpoints, passes, validate
from tinker_hpc.gateway.custom_losses import creation_id
from tinker_hpc.gateway.desk import Desk, Payload, metadata, record_header, rejected, state_fields, with_optimizer
from tinker_hpc.gateway.ledger import ModelState
from tinker_hpc.gateway.refusals import bad_request, try_again, unknown
from tinker_hpc.gateway.routing import RoutingReplay
from tinker_hpc.gateway.wire import decode_forward_backward, forward_backward_digest, json_digest

# Smaller bodies are judged on the event loop: going to a thread and back would cost more.
INLINE_BYTES = 64 * 2**10


class Training:
    """forward_backward, optim_step, the saves, load_weights into a model; and the losses that passes may use."""

    def __init__(self, desk: Desk, losses: passes.Losses, routing: RoutingReplay) -> None:
        self._desk = desk
        self._losses = losses
        self._routing = routing

    async def forward_backward(self, body: bytes) -> Payload:
        def prepare() -> tuple[ModelState, Payload, Mapping[str, np.ndarray]]:
            try:
                call = decode_forward_backward(body)
            except RequestError as error:
                raise bad_request(str(error)) from error
            model = self._model(call.model_id)
            link = self._desk.workers.links[model.worker_index]
            header = _ordered_header("forward_backward", model, call.seq_id, forward_backward_digest(call))
            try:
                fields, arrays = passes.forward_backward(call, link.base, self._losses)
            except RequestError as error:
                return model, {**header, **rejected("forward_backward", error)}, {}
            return model, {**header, **fields}, arrays

        if len(body) <= INLINE_BYTES:
            model, header, arrays = prepare()
        else:
            model, header, arrays = await asyncio.get_running_loop().run_in_executor(self._desk.intake.pool, prepare)
        link = self._desk.workers.links[model.worker_index]
        if header["op"] == "forward_backward":
            header |= await self._routing.of_pass(link, arrays)
        return await self._desk.accept(link, header, arrays)

    async def create_custom_loss(self, payload: Payload) -> Payload:
        """Answered directly, so that a wrong one is refused directly; nothing is ordered behind it."""
        try:
            session_id = validate.text(payload, "session_id")
            self._desk.sessions.active(session_id)
            number = validate.integer(payload, "custom_loss_seq_id")
            loss_id = await asyncio.to_thread(self._losses.uploaded.create, payload)
        except RequestError as error:
            raise bad_request(str(error)) from error
        except DataRootError as error:
            raise try_again(f"the loss was not stored: {error} The SDK tries again for 5 minutes.") from error
        return {"request_id": creation_id(session_id, number, loss_id)}

    async def optim_step(self, payload: Payload) -> Payload:
        return await self._ordered("optim_step", payload, lambda model: {"adam": validate.adam(payload)})

    async def save_weights(self, payload: Payload) -> Payload:
        def judge(model: ModelState) -> Payload:
            name = validate.checkpoint_name(payload.get("path"))
            return {
                "overwrite": bool(payload.get("overwrite")),
                **self._target(model, "weights", name),
                "age": str(model.age),
                "ttl_seconds": validate.ttl_seconds(payload.get("ttl_seconds")),
                "user_metadata": metadata(payload),
            }

        return await self._ordered("save_state", payload, judge)

    async def save_weights_for_sampler(self, payload: Payload) -> Payload:
        def judge(model: ModelState) -> Payload:
            ttl = validate.ttl_seconds(payload.get("ttl_seconds"))
            if payload.get("path") is None:
                # kind "inflight" may adopt later weights, it need not: a snapshot keeps its promise too.
                validate.integer(payload, "sampling_session_seq_id")
                # Not named after that number: the SDK takes a new one for every *retry*, so a loop that is started
                # again, and retries at other moments, would meet ids that stand for other samplers.
                return {"sampling_session_id": f"{model.model_id}:sample:{payload['seq_id']}"}
            name = validate.checkpoint_name(payload["path"])
            target = self._target(model, "sampler_weights", name)
            return {**target, "ttl_seconds": ttl, "user_metadata": metadata(payload)}

        return await self._ordered("save_sampler_weights", payload, judge, free=("sampling_session_seq_id",))

    async def save_weights_external(self, payload: Payload) -> Payload:
        """The adapter in the format peft, transformers and vLLM load: that of every checkpoint here."""

        def judge(model: ModelState) -> Payload:
            if payload.get("age_encryption_recipients"):
                raise RequestError(
                    "age_encryption_recipients is not offered: the files stay on your cluster, readable by you alone. "
                    "Leave it out, and encrypt what leaves the cluster: age -r RECIPIENT FILE."
                )
            ttl = validate.ttl_seconds(payload.get("ttl_seconds"))
            name = validate.checkpoint_name(payload.get("path"))
            return {**self._target(model, "external_weights", name), "ttl_seconds": ttl}

        return await self._ordered("save_sampler_weights", payload, judge)

    async def load_weights(self, payload: Payload) -> Payload:
        # Outside judge: reading a checkpoint's metadata may wait for the disk.
        try:
            found = await self._desk.checkpoint(payload, "path")
        except RequestError as error:
            found = error

        def judge(model: ModelState) -> Payload:
            if isinstance(found, RequestError):
                raise found
            link = self._desk.workers.links[model.worker_index]
            if not link.serves(found.base_model):
                raise RequestError(
                    f"checkpoint {found.path} belongs to base model {found.base_model!r}, "
                    f"this model to {link.base.name!r}."
                )
            for key in ("rank", "train_mlp", "train_attn", "train_unembed", "per_expert"):
                otherwise = key != "per_expert"
                theirs, ours = found.lora.get(key, otherwise), model.lora.get(key, otherwise)
                if theirs != ours:
                    raise RequestError(
                        f"checkpoint {found.path} has {key}={theirs}, this model has {ours}. "
                        "Use service_client.create_training_client_from_state(path): it takes it from the checkpoint."
                    )
            return state_fields(found, with_optimizer(payload, found))

        return await self._ordered("load_state", payload, judge)

    async def _ordered(
        self, op: str, payload: Payload, judge: Callable[[ModelState], Payload], *, free: tuple[str, ...] = ()
    ) -> Payload:
        try:
            model = self._model(validate.text(payload, "model_id"))
            seq_id = validate.integer(payload, "seq_id", least=1)
        except RequestError as error:
            raise bad_request(str(error)) from error
        header = _ordered_header(op, model, seq_id, json_digest(payload, without=free))
        try:
            header.update(judge(model))
        except RequestError as error:
            header.update(rejected(op, error))
        return await self._desk.accept(self._desk.workers.links[model.worker_index], header)

    def _model(self, model_id: str) -> ModelState:
        model = self._desk.ledger.models.get(model_id)
        if model is None:
            refused = self._desk.ledger.refused_models.get(model_id)
            why = (
                f"its creation was refused: {refused}" if refused else "models belong to one run; create it here first."
            )
            raise unknown(f"unknown model {model_id!r}: {why}")
        return model

    def _target(self, model: ModelState, kind: str, name: str) -> Payload:
        path = checkpoints.TinkerPath(model.model_id, kind, name)
        target: Payload = {"name": name, "path": str(path), "folder": str(path.folder(self._desk.root))}
        if checkpoints.is_gone(self._desk.root, path):
            # Expired or deleted, its files not removed yet: the name is free.
            target["overwrite"] = True
        return target


def _ordered_header(op: str, model: ModelState, seq_id: int, digest: str) -> dict[str, Any]:
    if seq_id < 1:
        raise bad_request(f"seq_id is {seq_id}, expected 1 or more.")
    return record_header(f"{model.model_id}:{seq_id}", op, digest=digest, model_id=model.model_id, seq_id=seq_id)
