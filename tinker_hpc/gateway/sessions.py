"""SDK sessions: a ServiceClient opens one, its models and samplers are named after it.

Kept in sessions.json, replaced whole on every change: there are few, and they must be known again after a restart. A
session without heartbeats is never ended: a starved client thread beats late, and the job's end ends everything.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinker_hpc.errors import DataRootError
from tinker_hpc.gateway.refusals import Refusal, try_again, unknown
from tinker_hpc.run_folder import read_json, write_json


@dataclass
class Session:
    """One ServiceClient. `finished` is {reason, detail, at} once the client said so (first one wins)."""

    session_id: str
    created_at: float
    sdk_version: str = ""
    display_name: str | None = None
    user_metadata: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    finished: dict[str, Any] | None = None


class Sessions:
    """All sessions of this gateway."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        known = read_json(path) or {}
        self._sessions = {session_id: Session(**fields) for session_id, fields in known.items()}

    async def create(self, payload: dict[str, Any]) -> Session:
        """Open a session. Raises: Refusal 503 if it cannot be written."""
        # The date makes a checkpoint folder's name tell people something; 48 random bits make it unique.
        session_id = f"s-{time.strftime('%Y%m%d')}-{secrets.token_hex(6)}"
        metadata, tags = payload.get("user_metadata"), payload.get("tags")
        session = Session(
            session_id=session_id,
            created_at=time.time(),
            sdk_version=str(payload.get("sdk_version", "")),
            display_name=payload.get("display_name"),
            user_metadata=metadata if isinstance(metadata, dict) else {},
            tags=tags if isinstance(tags, list) else [],
        )
        self._sessions[session_id] = session
        try:
            await self._save()
        except Refusal:
            del self._sessions[session_id]
            raise
        return session

    async def finish(self, session_id: str, payload: dict[str, Any]) -> None:
        """The client says it is done."""
        session = self.get(session_id)
        if session.finished is None:
            reason = payload.get("reason")
            session.finished = {
                "reason": reason.get("type") if isinstance(reason, dict) else reason,
                "detail": payload.get("detail"),
                "at": time.time(),
            }
            await self._save()

    def heartbeat(self, session_id: str) -> None:
        """Raises: Refusal 410 if the session has finished: the SDK then stops beating."""
        if self.get(session_id).finished is not None:
            raise Refusal(410, f"session {session_id} has finished.")

    def get(self, session_id: str) -> Session:
        """Raises: Refusal 404 if there is none."""
        session = self._sessions.get(session_id)
        if session is None:
            raise unknown(
                f"unknown session {session_id!r}. Sessions belong to one run; make a new tinker.ServiceClient()."
            )
        return session

    def active(self, session_id: str) -> Session:
        """The session, if it may still create things. Raises: Refusal 404 or 422."""
        session = self.get(session_id)
        if session.finished is not None:
            raise Refusal(422, f"session {session_id} was closed by its client; make a new tinker.ServiceClient().")
        return session

    def ids(self) -> list[str]:
        """Newest first."""
        return list(reversed(self._sessions))

    async def _save(self) -> None:
        async with self._lock:
            value = {session_id: asdict(session) for session_id, session in self._sessions.items()}
            try:
                await asyncio.to_thread(write_json, self._path, value)
            except DataRootError as error:
                raise try_again(f"the session was not opened: {error} The SDK tries again.") from error
