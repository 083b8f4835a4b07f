"""Step 3 of a request. Before: the stock tinker SDK. After: gateway/models.py, training.py, samplers.py.

The routes that ask for work and fetch its results, thin: read the body, call, answer. Paths and shapes are the SDK's
(tinker 0.25 to 0.38). What is read and managed without a worker is in gateway/rest.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinker_hpc.gateway import rest
from tinker_hpc.gateway.desk import Desk
from tinker_hpc.gateway.guard import MAX_FORWARD_BACKWARD_BYTES, MAX_JSON_BYTES, Guard, read_body
from tinker_hpc.gateway.http import Handler, answering, json_body, json_response, no_such_route, route
from tinker_hpc.gateway.lookup import Lookup
from tinker_hpc.gateway.models import Models
from tinker_hpc.gateway.refusals import Refusal
from tinker_hpc.gateway.retention import keep_sweeping
from tinker_hpc.gateway.retrieval import NotYet, Retrieval
from tinker_hpc.gateway.samplers import Samplers
from tinker_hpc.gateway.shelf import Shelf
from tinker_hpc.gateway.training import Training
from tinker_hpc.gateway.wire import PROTOBUF
from tinker_hpc.gateway.workers import WorkerLink
from tinker_hpc.run_folder import RunFolder

# On loopback a call travels in one piece: fewer records, no chunk to wait for.
CLIENT_CONFIG = {
    # The SDK takes its identity (whoami) from the token it gets for its key; see gateway/identity.py.
    "pjwt_auth_enabled": True,
    "proto_compress_fwdbwd": False,
    "parallel_fwdbwd_chunks": True,
    "fwdbwd_max_chunk_len": 65536,
    "fwdbwd_max_chunk_bytes_count": 64 * 2**20,
    "fwdbwd_dispatch_bytes_semaphore_size": 256 * 2**20,
    "inflight_response_bytes_semaphore_size": 256 * 2**20,
    # Of SDKs that know no retrieve_futures (before 0.28) each sample in flight holds a connection, two file descriptors
    # on this node; 1024 is a common limit.
    "sample_max_concurrent_requests": 400,
    # A job may wait in the queue for longer than the two hours after which the SDK would call a sample stuck.
    "sample_enable_stuck_detection": False,
    "sample_use_retrieve_futures": True,
    "sample_join_sampling_session": True,
    # SDKs before 0.36 do not know it, and compute such losses beside the loop.
    "custom_loss_server_side": True,
    "use_pyqwest_transport": True,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 3600, "sample_cancel_enabled": True}


def build(
    *,
    desk: Desk,
    models: Models,
    training: Training,
    samplers: Samplers,
    lookup: Lookup,
    retrieval: Retrieval,
    shelf: Shelf,
    run: RunFolder,
    api_key: str,
) -> Starlette:
    """The ASGI application. Its lifespan starts and stops the threads that read results, and the sweeping."""

    async def config(request: Request) -> Any:
        # The SDK asks this one over a connection of its own that it never closes (tinker 0.38): so we do.
        return json_response(CLIENT_CONFIG, headers={"Connection": "close"})

    async def dynamic_config(request: Request) -> Any:
        return DYNAMIC_CONFIG

    async def create_session(request: Request) -> Any:
        session = await desk.sessions.create(await json_body(request))
        return {"type": "create_session", "session_id": session.session_id}

    async def heartbeat(request: Request) -> Any:
        desk.sessions.heartbeat(str((await json_body(request)).get("session_id")))
        return {"type": "session_heartbeat"}

    async def forward_backward(request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0] != PROTOBUF:
            raise Refusal(415, f"forward_backward takes {PROTOBUF}; JSON went away with tinker 0.25. Update tinker.")
        return await training.forward_backward(await read_body(request, MAX_FORWARD_BACKWARD_BYTES))

    async def load_weights(request: Request) -> Any:
        payload = await json_body(request)
        # With a session: a new model, from a saved state. Without (deprecated): into the model it names.
        into_a_model = payload.get("session_id") is None
        return await (training.load_weights(payload) if into_a_model else models.create_from_state(payload))

    async def retrieve_future(request: Request) -> Any:
        request_id = (await json_body(request)).get("request_id")
        iteration = request.headers.get("x-tinker-request-iteration", "0")
        try:
            answer = await retrieval.answer(str(request_id), int(iteration != "0"))
        except NotYet as not_yet:
            return json_response(not_yet.body, status=408)
        return Response(answer.body, media_type=answer.media_type)

    async def cancel_future(request: Request) -> Any:
        await samplers.cancel(await json_body(request))
        return Response(status_code=204)

    async def get_info(request: Request) -> Any:
        return lookup.info(str((await json_body(request)).get("model_id")))

    async def telemetry(request: Request) -> Any:
        await read_body(request, MAX_JSON_BYTES)  # read so that the connection stays usable; kept nowhere
        return {"status": "accepted"}

    async def close(request: Request) -> Any:
        await desk.close()
        return {"status": "closed"}

    def takes(method: Callable[[dict[str, Any]], Awaitable[Any]]) -> Handler:
        async def endpoint(request: Request) -> Any:
            return await method(await json_body(request))

        return endpoint

    posts: dict[str, Any] = {
        "client/config": config,
        "client/dynamic_config": dynamic_config,
        "create_session": create_session,
        "session_heartbeat": heartbeat,
        "create_model": takes(models.create),
        "get_info": get_info,
        "forward_backward": forward_backward,
        "create_custom_loss": takes(training.create_custom_loss),
        "optim_step": takes(training.optim_step),
        "save_weights": takes(training.save_weights),
        "load_weights": load_weights,
        "save_weights_for_sampler": takes(training.save_weights_for_sampler),
        "save_weights_external": takes(training.save_weights_external),
        "create_sampling_session": takes(samplers.open),
        "asample": takes(samplers.sample),
        "retrieve_future": retrieve_future,
        "retrieve_futures": takes(retrieval.completions),
        "cancel_future": cancel_future,
        "join_sampling_session": takes(samplers.join),
        "telemetry": telemetry,
    }
    routes = [route("POST", path, handler) for path, handler in posts.items()]
    routes += rest.routes(desk, lookup, shelf, run=run, api_key=api_key)
    routes.append(Route("/internal/close", answering(close), methods=["POST"]))

    @asynccontextmanager
    async def lifespan(app: Starlette):
        loop = asyncio.get_running_loop()

        def start(link: WorkerLink) -> None:
            desk.ledger.replay(link.requests(), link.index, link.taken_back)
            link.start(loop, desk.ledger.futures)

        desk.on_new_worker = start
        for link in desk.workers.links.values():
            link.start(loop, desk.ledger.futures)
        sweeping = asyncio.create_task(keep_sweeping(desk.root))
        yield
        sweeping.cancel()
        for link in desk.workers.links.values():
            await asyncio.to_thread(link.stop)

    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, api_key=api_key)],
        exception_handlers={HTTPException: no_such_route},
    )
