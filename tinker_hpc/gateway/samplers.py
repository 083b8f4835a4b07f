"""Step 3 of a request. Before: gateway/app.py. After: gateway/intake.py.

Samplers are opened, and asked for samples. Samples have no order among each other; a wrong one is accepted as
`rejected` all the same, so that its future fails with the words.
"""

from __future__ import annotations

import numpy as np

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import sampling, validate
from tinker_hpc.gateway.desk import Desk, Payload, record_header, rejected
from tinker_hpc.gateway.ledger import SamplerState
from tinker_hpc.gateway.refusals import Refusal, bad_request, unknown
from tinker_hpc.gateway.routing import RoutingReplay
from tinker_hpc.gateway.wire import json_digest


class Samplers:
    """create_sampling_session, asample, join_sampling_session, cancel_future."""

    def __init__(self, desk: Desk, routing: RoutingReplay) -> None:
        self._desk = desk
        self._routing = routing

    async def open(self, payload: Payload) -> Payload:
        """Answered directly, so that a wrong one is refused directly; nothing is ordered behind it."""
        try:
            session_id = validate.text(payload, "session_id")
            self._desk.sessions.active(session_id)
            number = validate.integer(payload, "sampling_session_seq_id")
            if payload.get("model_path") is not None:
                checkpoint = await self._desk.checkpoint(payload, "model_path")
                link = await self._desk.serving(checkpoint.base_model)
                source = {"type": "folder", "folder": str(checkpoint.folder), "path": str(checkpoint.path)}
            else:
                link = await self._desk.serving(validate.text(payload, "base_model"))
                source = {"type": "base"}
        except RequestError as error:
            raise bad_request(str(error)) from error
        name = await self._desk.sessions.sampler_name(session_id, number, str(source.get("path") or link.base.name))
        sampling_session_id = f"{session_id}:sample:{name}"
        digest = json_digest(payload, without=("sampling_session_seq_id",))
        header = record_header(f"{sampling_session_id}:open", "open_sampler", digest=digest)
        return await self._desk.accept(link, {**header, "sampling_session_id": sampling_session_id, "source": source})

    async def sample(self, payload: Payload) -> Payload:
        try:
            sampling_session_id = validate.text(payload, "sampling_session_id")
            seq_id = validate.integer(payload, "seq_id")
        except RequestError as error:
            raise bad_request(
                f"{error} Sampling goes through a sampler: service_client.create_sampling_client(...)."
            ) from error
        sampler = self._sampler(sampling_session_id)
        link = self._desk.workers.links[sampler.worker_index]
        digest = json_digest(payload)
        header = record_header(f"{sampling_session_id}:{seq_id}", "sample", digest=digest, seq_id=seq_id)
        header["sampling_session_id"] = sampling_session_id
        arrays: dict[str, np.ndarray] = {}
        try:
            fields, arrays = sampling.sample(payload, link.base)
            fields["seed"] = self._desk.seed(fields["seed"], f"{sampler.label}:{seq_id}")
            header.update(fields | self._routing.of_sample(link.base))
        except RequestError as error:
            header.update(rejected("sample", error))
        return await self._desk.accept(link, header, arrays)

    async def join(self, payload: Payload) -> Payload:
        """A number of its own for a copy of a sampling client, so that copies never use the same request ids."""
        try:
            sampling_session_id = validate.text(payload, "sampling_session_id")
        except RequestError as error:
            raise bad_request(str(error)) from error
        self._sampler(sampling_session_id)
        number = await self._desk.sessions.add_copy(sampling_session_id)
        return {"type": "join_sampling_session", "client_counter": number}

    async def cancel(self, payload: Payload) -> None:
        """Stop a sample nobody waits for. One that is done stays done."""
        try:
            request_id = validate.text(payload, "request_id")
        except RequestError as error:
            raise bad_request(str(error)) from error
        future = self._desk.ledger.futures.get(request_id)
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
        header = record_header(f"{request_id}:cancel", "cancel", digest="")
        await self._desk.accept(self._desk.workers.links[future.worker_index], {**header, "cancels": request_id})

    def _sampler(self, sampling_session_id: str) -> SamplerState:
        sampler = self._desk.ledger.samplers.get(sampling_session_id)
        if sampler is None:
            raise unknown(f"unknown sampler {sampling_session_id!r}. Samplers belong to one run; create it here first.")
        return sampler
