"""Who may ask at all: the key, the Host header, the size of a body. Pure ASGI, before any route runs."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tinker_hpc.gateway.identity import may_ask
from tinker_hpc.gateway.refusals import Refusal, bad_request
from tinker_hpc.gateway.wire import JSON, json_bytes

# Others on the node can reach 127.0.0.1 too, and a browser can be talked into it under a foreign name (DNS rebinding).
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
OPEN_PATHS = frozenset({"/api/v1/healthz"})

MAX_JSON_BYTES = 64 * 2**20
# Four times the chunk size that client/config asks for; a datum alone may pass the chunk size.
MAX_FORWARD_BACKWARD_BYTES = 256 * 2**20


class Guard:
    """Refuses foreign Host headers (403), wrong keys and old tokens (401); everything else goes on to `app`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if _without_port(host) not in LOOPBACK_HOSTS:
            await _answer(
                send, 403, f"Host {host!r} is not this machine. Use the base_url in gateway.json, or an ssh -L."
            )
            return
        presented = headers.get(b"x-api-key", b"").decode("latin-1")
        if scope["path"] not in OPEN_PATHS and not may_ask(self._api_key, presented, time.time()):
            await _answer(
                send,
                401,
                "wrong or missing API key. Each run has its own: set TINKER_API_KEY to the api_key in the run's "
                "gateway.json (inside a submitted run it is set for you).",
            )
            return
        await self.app(scope, receive, send)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises: Refusal 413 beyond `limit` bytes, 415 if it is compressed."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(
            415, f"Content-Encoding {encoding!r} is not taken: on loopback compression only costs time. Send it plain."
        )
    length = request.headers.get("content-length", "0")
    if not length.isdigit():
        raise bad_request(f"Content-Length is {length!r}, expected a number.")
    if int(length) > limit:
        raise _too_big(int(length), limit)
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise _too_big(size, limit)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_big(size: int, limit: int) -> Refusal:
    return Refusal(413, f"the body has {size} bytes or more, at most {limit} are taken. Send fewer datums a call.")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.partition(":")[0].lower()


async def _answer(send: Send, status: int, message: str) -> None:
    body = json_bytes({"error": message, "category": "user"})
    headers = [
        (b"content-type", JSON.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # nobody we want to keep waiting for
    ]
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer error="invalid_token"'))  # the SDK then asks for a fresh token
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
