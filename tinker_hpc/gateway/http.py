"""What every route shares: bodies in, values and refusals out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.guard import MAX_JSON_BYTES, read_body
from tinker_hpc.gateway.refusals import Refusal, bad_request
from tinker_hpc.gateway.wire import JSON, json_bytes, parse_json

# The SDK asks for a result again at once after a 5xx: without a pause that would be a hot loop.
ERROR_PAUSE_S = 1.0
MAX_PAGE = 10_000

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Any]]
Endpoint = Callable[[Request], Awaitable[Response]]


def route(method: str, path: str, handler: Handler) -> Route:
    """`method` on /api/v1/`path`, answered by what `handler` returns."""
    return Route(f"/api/v1/{path}", answering(handler), methods=[method])


def answering(handler: Handler) -> Endpoint:
    """Values become JSON, None an empty 204, refusals their status and sentence."""

    async def endpoint(request: Request) -> Response:
        try:
            value = await handler(request)
        except Refusal as refusal:
            return json_response({"error": refusal.message, "category": "user"}, status=refusal.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            log.exception("%s %s", request.method, request.url.path)
            await asyncio.sleep(ERROR_PAUSE_S)
            message = f"the gateway failed ({type(error).__name__}: {error}); its log has the traceback."
            return json_response({"error": message, "category": "server"}, status=500)
        if value is None:
            return Response(status_code=204)
        return value if isinstance(value, Response) else json_response(value)

    return endpoint


async def no_such_route(request: Request, error: Exception) -> Response:
    """404 and 405 in words."""
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path} is not offered by this tinker_hpc gateway "
        f"({'no such route' if error.status_code == 404 else error.detail}). It speaks the endpoints of tinker 0.25 "
        "to 0.38."
    )
    return json_response({"error": message, "category": "user"}, status=error.status_code)


async def json_body(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises: Refusal."""
    try:
        return parse_json(await read_body(request, MAX_JSON_BYTES))
    except RequestError as error:
        raise bad_request(str(error)) from error


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status_code=status, media_type=JSON, headers=headers)


def page(request: Request, default_limit: int = 20) -> tuple[int, int]:
    """(limit, offset) of the query string. Raises: Refusal."""
    limit = request.query_params.get("limit", str(default_limit))
    offset = request.query_params.get("offset", "0")
    if not (limit.isascii() and limit.isdigit() and offset.isascii() and offset.isdigit()) or len(limit + offset) > 30:
        raise bad_request(f"limit is {limit[:40]!r} and offset {offset[:40]!r}, expected whole numbers.")
    return min(int(limit), MAX_PAGE), int(offset)
