"""SDK sessions: a ServiceClient opens one, its models and samplers are named after it.

Kept in sessions.json, replaced whole on every change: there are few, and they must be known again after a restart. A
session without heartbeats is never ended: a starved client thread beats late, and the job's end ends everything.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinker_hpc.errors import DataRootError
from tinker_hpc.gateway.refusals import Refusal, bad_request, conflicting, try_again, unknown
from tinker_hpc.gateway.replay import Replay
from tinker_hpc.gateway.seeds import without_chance
from tinker_hpc.private_files import read_json, write_json

DEFAULT_PROJECT = "default"


@dataclass
class Session:
    """One ServiceClient.

    Attributes:
        project_id: a label: sessions, and through them models and checkpoints, can be listed by it.
        finished: {reason, detail, at} once the client said so (first one wins).
        number: in the order they were opened, from 1; 0 for one that holds a copy.
        loop_start: which start of the loop opened it last (replay.py).
        made_for: the idempotency key of the copy_weights this session was made for.
        copies: by sampler, how many copies of its client (pickled, or made from a handle) have joined.
        samplers: of this start of the loop, by the client's number, how each is named (`sampler_name`).
    """

    session_id: str
    created_at: float
    sdk_version: str = ""
    display_name: str | None = None
    user_metadata: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    finished: dict[str, Any] | None = None
    project_id: str = DEFAULT_PROJECT
    made_for: str | None = None
    copies: dict[str, int] = field(default_factory=dict)
    samplers: dict[str, str] = field(default_factory=dict)
    number: int = 0
    loop_start: int = 0


class Sessions:
    """All sessions of this gateway."""

    def __init__(self, path: Path, replay: Replay) -> None:
        self._path = path
        self._replay = replay
        self._lock = asyncio.Lock()
        known = read_json(path) or {}
        self._sessions = {session_id: Session(**fields) for session_id, fields in known.items()}

    async def create(self, payload: dict[str, Any]) -> Session:
        """Open a session; for a loop that was started again the one it opened then, so that all its ids are the same.

        Raises: Refusal 400 for fields of the wrong type, 503 if it cannot be written.
        """
        metadata, tags = payload.get("user_metadata"), payload.get("tags")
        try:
            await self._replay.look()
        except DataRootError as error:
            raise try_again(f"the session was not opened: {error} The SDK tries again.") from error
        recorded = self._recorded(metadata if isinstance(metadata, dict) else {})
        if recorded is not None:
            before = recorded.loop_start, recorded.finished, recorded.copies, recorded.samplers
            recorded.loop_start, recorded.finished = self._replay.start, None
            recorded.copies, recorded.samplers = {}, {}
            try:
                await self._save()
            except Refusal:
                recorded.loop_start, recorded.finished, recorded.copies, recorded.samplers = before
                raise
            return recorded
        return await self._add(
            Session(
                session_id=_new_id(),
                created_at=time.time(),
                sdk_version=str(payload.get("sdk_version", "")),
                display_name=_text_or_none(payload, "display_name"),
                user_metadata=metadata if isinstance(metadata, dict) else {},
                tags=tags if isinstance(tags, list) else [],
                project_id=_text_or_none(payload, "project_id") or DEFAULT_PROJECT,
                number=1 + max((session.number for session in self._sessions.values()), default=0),
                loop_start=self._replay.start,
            )
        )

    async def for_copy(self, project_id: str, source: str, idempotency_key: str | None) -> Session:
        """The finished session that holds a copy: a new one, or that of the same request before."""
        for session in self._sessions.values():
            if idempotency_key is not None and session.made_for == idempotency_key:
                return session
        now = time.time()
        finished = {"reason": "success", "detail": "made to hold a copy", "at": now}
        name = f"copy of {source}"
        fields = {"project_id": project_id, "finished": finished, "made_for": idempotency_key}
        return await self._add(Session(_new_id(), now, display_name=name, **fields))

    async def _add(self, session: Session) -> Session:
        self._sessions[session.session_id] = session
        try:
            await self._save()
        except Refusal:
            del self._sessions[session.session_id]
            raise
        return session

    async def assign_project(self, session_id: str, payload: dict[str, Any]) -> None:
        """Move a session into a project. Raises: Refusal 404, 400."""
        session = self.get(session_id)
        project_id = _text_or_none(payload, "project_id")
        if not project_id:
            raise bad_request("project_id is missing; give the name of the project the session moves to.")
        before, session.project_id = session.project_id, project_id
        try:
            await self._save()
        except Refusal:
            session.project_id = before
            raise

    def _recorded(self, user_metadata: dict[str, Any]) -> Session | None:
        """The first session of an earlier start of the loop that this start has not opened yet; rather one that was
        opened with the same metadata, for a program with several clients may open them in any order.
        """
        opened = [session for session in self._sessions.values() if session.number > 0]  # 0: made to hold a copy
        recorded = [session for session in opened if session.loop_start < self._replay.start]
        recorded.sort(key=lambda session: session.number)
        same = [session for session in recorded if session.user_metadata == user_metadata]
        return next(iter(same or recorded), None)

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

    async def add_copy(self, sampling_session_id: str) -> int:
        """The number of one more copy of a sampling client, from 1; never given twice. Raises: Refusal 404, 503."""
        session = self.get(sampling_session_id.partition(":")[0])
        number = session.copies[sampling_session_id] = session.copies.get(sampling_session_id, 0) + 1
        await self._save()
        return number

    async def sampler_name(self, session_id: str, number: int, source: str) -> str:
        """The name within its session of the sampler that a client opens under a number of its own.

        Not that number: the SDK takes it from a counter which also goes up with every *retry* of a snapshot (tinker
        0.38), so a loop that is started again and retries at other moments would find other samplers, or none, under
        it. It is named after what it reads and how many of this start read the same; the number tells a retry.

        Raises: Refusal 404, 422, 503.
        """
        session = self.get(session_id)
        key = hashlib.sha256(self.without_chance(source).encode()).hexdigest()[:12]
        known = session.samplers.get(str(number))
        if known is not None:
            if known.partition("-")[0] != key:
                raise conflicting(f"sampler {number} of session {session_id} was opened before, on something else.")
            return known
        same = sum(name.partition("-")[0] == key for name in session.samplers.values())
        name = session.samplers[str(number)] = f"{key}-{same}"
        await self._save()
        return name

    def without_chance(self, text: str) -> str:
        """See seeds.py: the random ids of sessions replaced by their numbers."""
        return without_chance(text, ((session.session_id, session.number) for session in self._sessions.values()))

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

    def all(self) -> list[Session]:
        """Newest first."""
        return list(reversed(self._sessions.values()))

    def project_of(self, session_id: str) -> str | None:
        """Its project; None for a session of another run."""
        session = self._sessions.get(session_id)
        return None if session is None else session.project_id

    async def _save(self) -> None:
        async with self._lock:
            value = {session_id: asdict(session) for session_id, session in self._sessions.items()}
            try:
                await asyncio.to_thread(write_json, self._path, value)
            except DataRootError as error:
                raise try_again(f"the session was not written: {error} The SDK tries again.") from error


def _new_id() -> str:
    # The date makes a checkpoint folder's name tell people something; 48 random bits make it unique.
    return f"s-{time.strftime('%Y%m%d')}-{secrets.token_hex(6)}"


def _text_or_none(payload: dict[str, Any], key: str) -> str | None:
    value = payload.get(key)
    if value is not None and not isinstance(value, str):
        raise bad_request(f"{key} is {value!r}, expected a text.")
    return value
