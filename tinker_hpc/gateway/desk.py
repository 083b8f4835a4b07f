"""Step 3 of a request. Before: gateway/app.py. After: gateway/intake.py.

One method an endpoint that asks for work: judge the request, make its record, accept it. A request that has a place in
its model's order is always accepted, a wrong one as `rejected`: refusing it outright would leave a hole that every
later request of that model waits for (tinker's clients number a request before they send it).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc.errors import DataRootError, RequestError
from tinker_hpc.gateway import checkpoints, passes, sampling, validate
from tinker_hpc.gateway.custom_losses import creation_id
from tinker_hpc.gateway.intake import Intake
from tinker_hpc.gateway.ledger import Ledger, ModelState
from tinker_hpc.gateway.refusals import Refusal, bad_request, try_again, unknown
from tinker_hpc.gateway.replay import Replay
from tinker_hpc.gateway.retention import Reads
from tinker_hpc.gateway.seeds import drawn
from tinker_hpc.gateway.sessions import Sessions
from tinker_hpc.gateway.wire import decode_forward_backward, forward_backward_digest, json_digest
from tinker_hpc.gateway.workers import WorkerLink, Workers

Payload = dict[str, Any]
Judged = tuple[dict[str, Any], dict[str, np.ndarray]]

# Smaller bodies are judged on the event loop: going to a thread and back would cost more.
INLINE_BYTES = 64 * 2**10


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
        losses: passes.Losses,
        run_seed: int,
        per_expert: bool,
    ) -> None:
        """per_expert: new adapters have LoRA matrices of their own for every expert (Config.expert_lora)."""
        self.root = root
        self.workers = workers
        self.ledger = ledger
        self.sessions = sessions
        self.reads = reads
        self.losses = losses
        self.run_seed = run_seed
        self.per_expert = per_expert
        self.intake = Intake(ledger, replay)
        self.on_new_worker: Callable[[WorkerLink], None] = lambda link: None

    # --- models -------------------------------------------------------------------------------------------------

    async def create_model(self, payload: Payload) -> Payload:
        session_id, model_id = self._new_model(payload)

        async def judge() -> tuple[WorkerLink, Judged]:
            name = validate.text(payload, "base_model")
            link = await self._serving(name)
            validate.optimizer_config(payload.get("optimizer_config"))
            lora = validate.lora(payload.get("lora_config"), link.base)
            lora |= {"seed": self._seed(lora["seed"], f"{model_id}:lora"), "per_expert": self.per_expert}
            header = {"base_model": link.base.name, "lora": lora, "user_metadata": _metadata(payload)}
            return link, (header, {})

        return await self._create(payload, session_id, model_id, judge)

    async def load_weights(self, payload: Payload) -> Payload:
        """Both forms: a new model from a saved state, or (deprecated) into an existing model."""
        if payload.get("session_id") is None:
            return await self._load_into_model(payload)
        session_id, model_id = self._new_model(payload)

        async def judge() -> tuple[WorkerLink, Judged]:
            checkpoint = await self._checkpoint(payload, "path")
            link = await self._serving(payload.get("base_model") or checkpoint.base_model)
            validate.optimizer_config(payload.get("optimizer_config"))
            with_optimizer = _with_optimizer(payload, checkpoint)
            lora = {key: checkpoint.lora.get(key, True) for key in ("train_mlp", "train_attn", "train_unembed")}
            seed = self._seed(checkpoint.lora.get("seed"), f"{model_id}:lora")
            lora["per_expert"] = checkpoint.lora.get("per_expert", False)
            header = {
                "base_model": link.base.name,
                "lora": {"rank": checkpoint.lora["rank"], "seed": seed, **lora},
                "from_state": _state(checkpoint, with_optimizer),
                "user_metadata": _metadata(payload),
            }
            return link, (header, {})

        return await self._create(payload, session_id, model_id, judge)

    def _new_model(self, payload: Payload) -> tuple[str, str]:
        """Ids of a model to be made. These are the SDK's own: wrong ones have no order to keep."""
        try:
            session_id = validate.text(payload, "session_id")
            number = validate.integer(payload, "model_seq_id")
        except RequestError as error:
            raise bad_request(str(error)) from error
        self.sessions.active(session_id)
        return session_id, f"{session_id}:train:{number}"

    async def _create(self, payload: Payload, session_id: str, model_id: str, judge: Any) -> Payload:
        header: dict[str, Any] = {
            "request_id": f"{model_id}:0",
            "op": "create_model",
            "model_id": model_id,
            "seq_id": 0,
            "digest": json_digest(payload),
            "accepted_at": time.time(),
            "session_id": session_id,
        }
        try:
            link, (fields, arrays) = await judge()
        except RequestError as error:
            link, fields, arrays = self._any_worker(), _rejected("create_model", error), {}
        return (await self.intake.accept(link, {**header, **fields}, arrays)).reply

    # --- requests in a model's order ----------------------------------------------------------------------------

    async def forward_backward(self, body: bytes) -> Payload:
        def prepare() -> tuple[ModelState, Payload, Mapping[str, np.ndarray]]:
            try:
                call = decode_forward_backward(body)
            except RequestError as error:
                raise bad_request(str(error)) from error
            model = self._model(call.model_id)
            link = self.workers.links[model.worker_index]
            header = _ordered_header("forward_backward", model, call.seq_id, forward_backward_digest(call))
            try:
                fields, arrays = passes.forward_backward(call, link.base, self.losses)
            except RequestError as error:
                return model, {**header, **_rejected("forward_backward", error)}, {}
            return model, {**header, **fields}, arrays

        if len(body) <= INLINE_BYTES:
            model, header, arrays = prepare()
        else:
            model, header, arrays = await asyncio.get_running_loop().run_in_executor(self.intake.pool, prepare)
        link = self.workers.links[model.worker_index]
        return (await self.intake.accept(link, header, arrays)).reply

    async def create_custom_loss(self, payload: Payload) -> Payload:
        """Answered directly, so that a wrong one is refused directly; nothing is ordered behind it."""
        try:
            session_id = validate.text(payload, "session_id")
            self.sessions.active(session_id)
            number = validate.integer(payload, "custom_loss_seq_id")
            loss_id = await asyncio.to_thread(self.losses.uploaded.create, payload)
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
                "user_metadata": _metadata(payload),
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
            return {**target, "ttl_seconds": ttl, "user_metadata": _metadata(payload)}

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

    async def _load_into_model(self, payload: Payload) -> Payload:
        # Outside judge: reading a checkpoint's metadata may wait for the disk.
        try:
            found = await self._checkpoint(payload, "path")
        except RequestError as error:
            found = error

        def judge(model: ModelState) -> Payload:
            if isinstance(found, RequestError):
                raise found
            link = self.workers.links[model.worker_index]
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
            return _state(found, _with_optimizer(payload, found))

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
            header.update(_rejected(op, error))
        return (await self.intake.accept(self.workers.links[model.worker_index], header)).reply

    def _model(self, model_id: str) -> ModelState:
        model = self.ledger.models.get(model_id)
        if model is None:
            refused = self.ledger.refused_models.get(model_id)
            why = (
                f"its creation was refused: {refused}" if refused else "models belong to one run; create it here first."
            )
            raise unknown(f"unknown model {model_id!r}: {why}")
        return model

    def _target(self, model: ModelState, kind: str, name: str) -> Payload:
        path = checkpoints.TinkerPath(model.model_id, kind, name)
        target: Payload = {"name": name, "path": str(path), "folder": str(path.folder(self.root))}
        if checkpoints.is_gone(self.root, path):  # expired or deleted, its files not removed yet: the name is free
            target["overwrite"] = True
        return target

    async def _checkpoint(self, payload: Payload, key: str) -> checkpoints.Checkpoint:
        """A checkpoint to read, noted as read by this run. Raises: RequestError; Refusal 503."""
        if payload.get("weights_access_token") is not None:
            raise RequestError(
                "weights_access_token is not offered: there are no accounts here, who may read a checkpoint is what "
                "its files say. Leave it out."
            )
        checkpoint = await asyncio.to_thread(checkpoints.load, self.root, payload.get(key))
        await self.reads.note(checkpoint)
        return checkpoint

    # --- samplers -----------------------------------------------------------------------------------------------

    async def create_sampling_session(self, payload: Payload) -> Payload:
        """Answered directly, so that a wrong one is refused directly; nothing is ordered behind it."""
        try:
            session_id = validate.text(payload, "session_id")
            self.sessions.active(session_id)
            number = validate.integer(payload, "sampling_session_seq_id")
            if payload.get("model_path") is not None:
                checkpoint = await self._checkpoint(payload, "model_path")
                link = await self._serving(checkpoint.base_model)
                source = {"type": "folder", "folder": str(checkpoint.folder), "path": str(checkpoint.path)}
            else:
                link = await self._serving(validate.text(payload, "base_model"))
                source = {"type": "base"}
        except RequestError as error:
            raise bad_request(str(error)) from error
        name = await self.sessions.sampler_name(session_id, number, str(source.get("path") or link.base.name))
        sampling_session_id = f"{session_id}:sample:{name}"
        header = {
            "request_id": f"{sampling_session_id}:open",
            "op": "open_sampler",
            "model_id": None,
            "seq_id": None,
            "digest": json_digest(payload, without=("sampling_session_seq_id",)),
            "accepted_at": time.time(),
            "sampling_session_id": sampling_session_id,
            "source": source,
        }
        return (await self.intake.accept(link, header)).reply

    async def sample(self, payload: Payload) -> Payload:
        try:
            sampling_session_id = validate.text(payload, "sampling_session_id")
            seq_id = validate.integer(payload, "seq_id")
        except RequestError as error:
            raise bad_request(
                f"{error} Sampling goes through a sampler: service_client.create_sampling_client(...)."
            ) from error
        sampler = self.ledger.samplers.get(sampling_session_id)
        if sampler is None:
            raise unknown(f"unknown sampler {sampling_session_id!r}. Samplers belong to one run; create it here first.")
        link = self.workers.links[sampler.worker_index]
        header: dict[str, Any] = {
            "request_id": f"{sampling_session_id}:{seq_id}",
            "op": "sample",
            "model_id": None,
            "seq_id": seq_id,
            "digest": json_digest(payload),
            "accepted_at": time.time(),
            "sampling_session_id": sampling_session_id,
        }
        arrays: dict[str, np.ndarray] = {}
        try:
            fields, arrays = sampling.sample(payload, link.base)
            fields["seed"] = self._seed(fields["seed"], f"{sampler.label}:{seq_id}")
            header.update(fields)
        except RequestError as error:
            header.update(_rejected("sample", error))
        return (await self.intake.accept(link, header, arrays)).reply

    def _seed(self, given: int | None, label: str) -> int:
        """The client's seed, or one drawn here and logged, so that redoing the log draws the same numbers."""
        return drawn(self.run_seed, self.sessions.without_chance(label)) if given is None else given

    async def join_sampling_session(self, payload: Payload) -> Payload:
        """A number of its own for a copy of a sampling client, so that copies never use the same request ids."""
        try:
            sampling_session_id = validate.text(payload, "sampling_session_id")
        except RequestError as error:
            raise bad_request(str(error)) from error
        if sampling_session_id not in self.ledger.samplers:
            raise unknown(f"unknown sampler {sampling_session_id!r}. Samplers belong to one run; create it here first.")
        number = await self.sessions.add_copy(sampling_session_id)
        return {"type": "join_sampling_session", "client_counter": number}

    async def cancel(self, payload: Payload) -> None:
        """Stop a sample nobody waits for. One that is done stays done."""
        try:
            request_id = validate.text(payload, "request_id")
        except RequestError as error:
            raise bad_request(str(error)) from error
        future = self.ledger.futures.get(request_id)
        if future is None:
            raise unknown(f"unknown request {request_id!r}: this gateway never accepted it.")
        if future.target is None:
            raise Refusal(
                422,
                f"request {request_id} is {future.op}; only samples can be cancelled. Other requests of a model build "
                "on each other: end the session or the run instead.",
            )
        if future.done:
            return
        header = {
            "request_id": f"{request_id}:cancel",
            "op": "cancel",
            "model_id": None,
            "seq_id": None,
            "digest": "",
            "accepted_at": time.time(),
            "cancels": request_id,
        }
        await self.intake.accept(self.workers.links[future.worker_index], header)

    # --- all ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """The loop has ended: the workers may end too."""
        await self.intake.close(list(self.workers.links.values()), time.time())

    async def _serving(self, base_model: str) -> WorkerLink:
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

    def _any_worker(self) -> WorkerLink:
        """Where to log a refusal that belongs to no worker: it must be known again after a restart."""
        if not self.workers.links:
            raise bad_request("this run has no worker yet; start one with tinker-hpc serve or tinker_hpc.submit.")
        return self.workers.links[min(self.workers.links)]


def _ordered_header(op: str, model: ModelState, seq_id: int, digest: str) -> dict[str, Any]:
    if seq_id < 1:
        raise bad_request(f"seq_id is {seq_id}, expected 1 or more.")
    return {
        "request_id": f"{model.model_id}:{seq_id}",
        "op": op,
        "model_id": model.model_id,
        "seq_id": seq_id,
        "digest": digest,
        "accepted_at": time.time(),
    }


def _rejected(op: str, error: RequestError) -> dict[str, Any]:
    return {"op": "rejected", "asked": op, "error": str(error), "category": "user"}


def _state(checkpoint: checkpoints.Checkpoint, optimizer: bool) -> dict[str, Any]:
    where = {"folder": str(checkpoint.folder), "path": str(checkpoint.path)}
    return {**where, "optimizer": optimizer, "age": checkpoint.age}


def _with_optimizer(payload: Payload, checkpoint: checkpoints.Checkpoint) -> bool:
    wanted = bool(payload.get("optimizer"))
    if wanted and not checkpoint.has_optimizer:
        raise RequestError(
            f"checkpoint {checkpoint.path} has no optimizer state. Use create_training_client_from_state(path), which "
            "starts a fresh optimizer, or a path from save_state(...)."
        )
    return wanted


def _metadata(payload: Payload) -> dict[str, Any] | None:
    return validate.metadata(payload.get("user_metadata"))
