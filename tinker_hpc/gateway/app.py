"""Step 3 of a request. Before: the stock tinker SDK. After: gateway/desk.py.

Routes, thin: read the body, call, answer. Paths and shapes are the SDK's (tinker 0.25 to 0.38).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.desk import Desk
from tinker_hpc.gateway.guard import MAX_FORWARD_BACKWARD_BYTES, MAX_JSON_BYTES, Guard, read_body
from tinker_hpc.gateway.lookup import Lookup
from tinker_hpc.gateway.refusals import Refusal, bad_request
from tinker_hpc.gateway.retrieval import NotYet, Retrieval
from tinker_hpc.gateway.wire import JSON, PROTOBUF, json_bytes, parse_json
from tinker_hpc.gateway.workers import WorkerLink

# On loopback a call travels in one piece: fewer records, no chunk to wait for.
CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "proto_compress_fwdbwd": False,
    "parallel_fwdbwd_chunks": True,
    "fwdbwd_max_chunk_len": 65536,
    "fwdbwd_max_chunk_bytes_count": 64 * 2**20,
    "fwdbwd_dispatch_bytes_semaphore_size": 256 * 2**20,
    "inflight_response_bytes_semaphore_size": 256 * 2**20,
    # Each sample in flight holds a connection, two file descriptors on this node; 1024 is a common limit.
    "sample_max_concurrent_requests": 400,
    # A job may wait in the queue for longer than the two hours after which the SDK would call a sample stuck.
    "sample_enable_stuck_detection": False,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "use_pyqwest_transport": True,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 3600, "sample_cancel_enabled": False}

# The SDK asks for a result again at once after a 5xx: without a pause that would be a hot loop.
ERROR_PAUSE_S = 1.0

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def build(desk: Desk, lookup: Lookup, retrieval: Retrieval, api_key: str) -> Starlette:
    """The ASGI application. Its lifespan starts and stops the threads that read results."""

    async def config(request: Request) -> Any:
        # The SDK asks this one over a connection of its own that it never closes (tinker 0.38): so we do.
        return _json_response(CLIENT_CONFIG, headers={"Connection": "close"})

    async def dynamic_config(request: Request) -> Any:
        return DYNAMIC_CONFIG

    async def healthz(request: Request) -> Any:
        return {"status": "ok"}

    async def whoami(request: Request) -> Any:
        return {"user_urn": "urn:tinker_hpc:user:local", "org_urn": "urn:tinker_hpc:org:local"}

    async def capabilities(request: Request) -> Any:
        return lookup.capabilities()

    async def create_session(request: Request) -> Any:
        session = await desk.sessions.create(await _json(request))
        return {"type": "create_session", "session_id": session.session_id}

    async def heartbeat(request: Request) -> Any:
        desk.sessions.heartbeat(str((await _json(request)).get("session_id")))
        return {"type": "session_heartbeat"}

    async def finish(request: Request) -> Any:
        await desk.sessions.finish(request.path_params["session_id"], await _json(request))
        return Response(status_code=204)

    async def sessions(request: Request) -> Any:
        limit, offset = _page(request)
        return {"sessions": desk.sessions.ids()[offset : offset + limit]}

    async def session(request: Request) -> Any:
        return lookup.session(request.path_params["session_id"])

    async def forward_backward(request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0] != PROTOBUF:
            raise Refusal(415, f"forward_backward takes {PROTOBUF}; JSON went away with tinker 0.25. Update tinker.")
        return await desk.forward_backward(await read_body(request, MAX_FORWARD_BACKWARD_BYTES))

    async def retrieve_future(request: Request) -> Any:
        request_id = (await _json(request)).get("request_id")
        iteration = request.headers.get("x-tinker-request-iteration", "0")
        try:
            answer = await retrieval.answer(str(request_id), int(iteration) if iteration.isdigit() else 0)
        except NotYet as not_yet:
            return _json_response(not_yet.body, status=408)
        return Response(answer.body, media_type=answer.media_type)

    async def get_info(request: Request) -> Any:
        return lookup.info(str((await _json(request)).get("model_id")))

    async def weights_info(request: Request) -> Any:
        return await lookup.weights_info((await _json(request)).get("tinker_path"))

    async def sampler(request: Request) -> Any:
        return lookup.sampler(request.path_params["sampler_id"])

    async def training_run(request: Request) -> Any:
        return await lookup.training_run(request.path_params["model_id"])

    async def training_runs(request: Request) -> Any:
        return await lookup.training_runs(*_page(request))

    async def model_checkpoints(request: Request) -> Any:
        return await lookup.checkpoints_of(request.path_params["model_id"])

    async def all_checkpoints(request: Request) -> Any:
        return await lookup.all_checkpoints(*_page(request))

    async def telemetry(request: Request) -> Any:
        await read_body(request, MAX_JSON_BYTES)  # read so that the connection stays usable; kept nowhere
        return {"status": "accepted"}

    async def close(request: Request) -> Any:
        await desk.close()
        return {"status": "closed"}

    def takes(method: Callable[[dict[str, Any]], Awaitable[Any]]) -> Handler:
        async def endpoint(request: Request) -> Any:
            return await method(await _json(request))

        return endpoint

    posts: dict[str, Any] = {
        "client/config": config,
        "client/dynamic_config": dynamic_config,
        "create_session": create_session,
        "session_heartbeat": heartbeat,
        "sessions/{session_id}/finish": finish,
        "create_model": takes(desk.create_model),
        "get_info": get_info,
        "forward_backward": forward_backward,
        "optim_step": takes(desk.optim_step),
        "save_weights": takes(desk.save_weights),
        "load_weights": takes(desk.load_weights),
        "save_weights_for_sampler": takes(desk.save_weights_for_sampler),
        "save_weights_external": takes(desk.save_weights_external),
        "create_sampling_session": takes(desk.create_sampling_session),
        "asample": takes(desk.sample),
        "retrieve_future": retrieve_future,
        "weights_info": weights_info,
        "telemetry": telemetry,
    }
    gets: dict[str, Any] = {
        "healthz": healthz,
        "auth/apikey/me": whoami,
        "get_server_capabilities": capabilities,
        "samplers/{sampler_id}": sampler,
        "sessions": sessions,
        "sessions/{session_id}": session,
        "training_runs": training_runs,
        "training_runs/{model_id}": training_run,
        "training_runs/{model_id}/checkpoints": model_checkpoints,
        "checkpoints": all_checkpoints,
    }
    routes = [Route(f"/api/v1/{path}", _answering(handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [Route(f"/api/v1/{path}", _answering(handler), methods=["GET"]) for path, handler in gets.items()]
    routes.append(Route("/internal/close", _answering(close), methods=["POST"]))

    @asynccontextmanager
    async def lifespan(app: Starlette):
        loop = asyncio.get_running_loop()

        def start(link: WorkerLink) -> None:
            desk.ledger.replay(link.requests(), link.index)
            link.start(loop, desk.ledger.futures)

        desk.on_new_worker = start
        for link in desk.workers.links.values():
            link.start(loop, desk.ledger.futures)
        yield
        for link in desk.workers.links.values():
            await asyncio.to_thread(link.stop)

    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, api_key=api_key)],
        exception_handlers={HTTPException: _no_such_route},
    )


def _answering(handler: Callable[[Request], Awaitable[Any]]) -> Handler:
    """Values become JSON, refusals become their status and sentence."""

    async def endpoint(request: Request) -> Response:
        try:
            value = await handler(request)
        except Refusal as refusal:
            return _json_response({"error": refusal.message, "category": "user"}, status=refusal.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            log.exception("%s %s", request.method, request.url.path)
            await asyncio.sleep(ERROR_PAUSE_S)
            message = f"the gateway failed ({type(error).__name__}: {error}); its log has the traceback."
            return _json_response({"error": message, "category": "server"}, status=500)
        return value if isinstance(value, Response) else _json_response(value)

    return endpoint


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path} is not offered by this tinker_hpc gateway "
        f"({'no such route' if error.status_code == 404 else error.detail}). It speaks Tinker's training and sampling "
        "endpoints; cloud services (billing, audit, publishing, copying) have no counterpart on a cluster."
    )
    return _json_response({"error": message, "category": "user"}, status=error.status_code)


async def _json(request: Request) -> dict[str, Any]:
    try:
        return parse_json(await read_body(request, MAX_JSON_BYTES))
    except RequestError as error:
        raise bad_request(str(error)) from error


def _json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status_code=status, media_type=JSON, headers=headers)


def _page(request: Request) -> tuple[int, int]:
    limit, offset = request.query_params.get("limit", "20"), request.query_params.get("offset", "0")
    if not (limit.isdigit() and offset.isdigit()):
        raise bad_request(f"limit is {limit!r} and offset {offset!r}, expected whole numbers.")
    return int(limit), int(offset)
