"""The routes of everything that needs no worker: who asks, what there is, and what becomes of what was saved.

Paths and shapes are those of the SDK's RestClient, its CLI and its ServiceClient (tinker 0.25 to 0.38).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from tinker_hpc.errors import RequestError, TinkerHpcError
from tinker_hpc.gateway import absent, identity, trace
from tinker_hpc.gateway.checkpoints import KINDS
from tinker_hpc.gateway.desk import Desk
from tinker_hpc.gateway.http import Handler, json_body, page, route
from tinker_hpc.gateway.lookup import Lookup
from tinker_hpc.gateway.refusals import bad_request, conflicting, unknown
from tinker_hpc.gateway.shelf import Shelf
from tinker_hpc.gateway.validate import integer, text, ttl_seconds
from tinker_hpc.run_folder import RunFolder

# A trace that takes longer is answered "pending", and the SDK asks again every five seconds.
TRACE_PATIENCE_S = 20.0

CHECKPOINT = "training_runs/{model_id}/checkpoints/{kind}/{name}"
CHECKPOINT_WITHOUT_KIND = "training_runs/{model_id}/checkpoints/{name}"


def routes(desk: Desk, lookup: Lookup, shelf: Shelf, *, run: RunFolder, api_key: str) -> list[Route]:
    """All of them."""
    return [
        *_service(lookup, api_key),
        *_training_runs(lookup),
        *_checkpoints(desk, lookup, shelf),
        *_sessions(desk, lookup, run),
        *absent.routes(),
    ]


def _service(lookup: Lookup, api_key: str) -> list[Route]:
    async def healthz(request: Request) -> Any:
        return {"status": "ok"}

    async def token(request: Request) -> Any:
        return {"jwt": identity.issue_token(api_key, time.time())}

    async def about_key(request: Request) -> Any:
        return identity.about_key()

    async def capabilities(request: Request) -> Any:
        return lookup.capabilities()

    async def sampler(request: Request) -> Any:
        return lookup.sampler(request.path_params["sampler_id"])

    return [
        route("GET", "healthz", healthz),
        route("POST", "auth/token", token),
        route("GET", "auth/apikey/me", about_key),
        route("GET", "get_server_capabilities", capabilities),
        route("GET", "samplers/{sampler_id}", sampler),
    ]


def _training_runs(lookup: Lookup) -> list[Route]:
    async def training_run(request: Request) -> Any:
        return await lookup.training_run(request.path_params["model_id"])

    async def training_runs(request: Request) -> Any:
        return await lookup.training_runs(*page(request), request.query_params.get("project_id"))

    return [
        route("GET", "training_runs", training_runs),
        route("GET", "training_runs/{model_id}", training_run),
    ]


def _checkpoints(desk: Desk, lookup: Lookup, shelf: Shelf) -> list[Route]:
    async def of_model(request: Request) -> Any:
        return await lookup.checkpoints_of(request.path_params["model_id"], _kinds_known_to(request))

    async def all_of_them(request: Request) -> Any:
        return await lookup.all_checkpoints(*page(request, default_limit=100), _kinds_known_to(request))

    async def weights_info(request: Request) -> Any:
        return await lookup.weights_info((await json_body(request)).get("tinker_path"))

    def one(act: Callable[..., Any]) -> Handler:
        """A handler of one checkpoint, named by its URL."""

        async def endpoint(request: Request) -> Any:
            return await asyncio.to_thread(act, **request.path_params)

        return endpoint

    async def set_ttl(request: Request) -> Any:
        await asyncio.to_thread(shelf.set_ttl, **request.path_params, payload=await json_body(request))

    async def copy(request: Request) -> Any:
        payload = await json_body(request)
        if payload.get("weights_access_token") or request.headers.get("x-tinker-weights-access-token"):
            raise bad_request(
                "weights_access_token is not offered: there are no accounts here, who may read a checkpoint is what "
                "its files say. Leave it out."
            )
        try:
            source, ttl = text(payload, "source_path"), ttl_seconds(payload.get("ttl_seconds"))
            await lookup.weights_info(source)  # refuse a wrong source before a session is made for it
            if payload.get("session_id") is not None:
                session = desk.sessions.active(text(payload, "session_id"))
                model_id = f"{session.session_id}:train:{integer(payload, 'model_seq_id')}"
            else:
                project = text(payload, "destination_project_id")
                key = request.headers.get("x-idempotency-key")
                session = await desk.sessions.for_copy(project, source, key)
                model_id = f"{session.session_id}:train:0"
        except RequestError as error:
            raise bad_request(str(error)) from error
        if model_id in desk.ledger.models:
            raise conflicting(f"{model_id} is a model in training; copy to a model_seq_id that is not used.")
        return {"tinker_path": await asyncio.to_thread(shelf.copy, source, model_id, ttl)}

    async def without_kind(request: Request) -> Any:
        name = request.path_params["name"]
        raise unknown(
            f"no checkpoint {name!r}: a checkpoint id has its kind before its name: {', '.join(KINDS)}, for example "
            f"'weights/{name}'."
        )

    return [
        route("GET", "checkpoints", all_of_them),
        route("GET", "training_runs/{model_id}/checkpoints", of_model),
        route("POST", "weights_info", weights_info),
        route("POST", "copy_weights", copy),
        route("DELETE", CHECKPOINT, one(shelf.delete)),
        route("PUT", f"{CHECKPOINT}/ttl", set_ttl),
        route("POST", f"{CHECKPOINT}/publish", one(shelf.publish)),
        route("DELETE", f"{CHECKPOINT}/publish", one(shelf.unpublish)),
        route("GET", f"{CHECKPOINT}/external_weights_urls", one(shelf.external_urls)),
        route("GET", f"{CHECKPOINT}/archive", one(shelf.archive)),
        route("DELETE", CHECKPOINT_WITHOUT_KIND, without_kind),
    ]


def _sessions(desk: Desk, lookup: Lookup, run: RunFolder) -> list[Route]:
    exporting: dict[str, asyncio.Task[Any]] = {}

    async def sessions(request: Request) -> Any:
        limit, offset = page(request)
        return {"sessions": desk.sessions.ids()[offset : offset + limit]}

    async def session(request: Request) -> Any:
        return lookup.session(request.path_params["session_id"])

    async def search(request: Request) -> Any:
        return await lookup.search_sessions(await json_body(request))

    async def finish(request: Request) -> Any:
        await desk.sessions.finish(request.path_params["session_id"], await json_body(request))

    async def assign(request: Request) -> Any:
        await desk.sessions.assign_project(request.path_params["session_id"], await json_body(request))

    async def trace_export(request: Request) -> Any:
        session_id = desk.sessions.get(request.path_params["session_id"]).session_id
        if session_id not in exporting:
            links = list(desk.workers.links.values())
            job = asyncio.to_thread(trace.export, links, session_id, run.traces)
            exporting[session_id] = asyncio.create_task(job)
        task = exporting[session_id]
        done, _ = await asyncio.wait([task], timeout=TRACE_PATIENCE_S)
        if not done:
            return {"status": "pending"}
        exporting.pop(session_id, None)
        try:
            return {"status": "ready", "url": task.result().as_uri()}
        except TinkerHpcError as error:
            return {"status": "failed", "error": str(error)}

    return [
        route("GET", "sessions", sessions),
        route("POST", "sessions/search", search),
        route("GET", "sessions/{session_id}", session),
        route("POST", "sessions/{session_id}/finish", finish),
        route("PUT", "sessions/{session_id}/project", assign),
        route("GET", "sessions/{session_id}/trace_export", trace_export),
    ]


def _kinds_known_to(request: Request) -> tuple[str, ...]:
    """The kinds of checkpoints the asking SDK can parse: before 0.28 a listing with external weights broke it."""
    version = re.match(r"(\d{1,4})\.(\d{1,4})\b", request.headers.get("x-stainless-package-version", ""))
    if version is not None and (int(version[1]), int(version[2])) < (0, 28):
        return ("weights", "sampler_weights")
    return KINDS
