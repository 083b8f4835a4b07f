"""Which sessions a search means, newest first, a page at a time. Pure; as tinker 0.38's SessionSearchRequest says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from tinker_hpc.gateway.checkpoints import iso_time
from tinker_hpc.gateway.sessions import Session
from tinker_hpc.gateway.validate import refuse

MAX_LIMIT, DEFAULT_LIMIT = 200, 50
_STATUSES = ("active", "cancelled", "failed", "client_finished")


def search(sessions: Iterable[Session], query: Mapping[str, Any], owner: str) -> tuple[list[Session], dict | None]:
    """One page of matches and the cursor of the next.

    Args:
        sessions: newest first.
        owner: the one owner there is.
    Raises: RequestError for a query that is none.
    """
    matches = _matcher(query, owner)
    limit = query.get("limit", DEFAULT_LIMIT)
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_LIMIT:
        refuse(f"limit is {limit!r}, expected 1 to {MAX_LIMIT}.")
    before = _cursor(query.get("cursor"))
    found = [s for s in sorted(sessions, key=_place, reverse=True) if matches(s) and (not before or _place(s) < before)]
    page = found[:limit]
    if len(found) <= limit:
        return page, None
    return page, {"last_created_at": iso_time(page[-1].created_at), "last_session_id": page[-1].session_id}


def status_of(session: Session) -> dict[str, Any]:
    """The SDK's `SessionStatus`: running, or how its client said it ended."""
    if session.finished is None:
        return {"type": "active"}
    reason = session.finished.get("reason")
    known = reason if reason in ("success", "errored", "interrupted") else "success"
    return {"type": "client_finished", "reason": {"type": known}, "detail": session.finished.get("detail")}


def _matcher(query: Mapping[str, Any], owner: str) -> Any:
    session_id, display_name = _text(query, "session_id"), _text(query, "display_name")
    projects = query.get("project_ids")
    if projects is not None and not _texts(projects):
        refuse(f"project_ids is {projects!r}, expected a list of texts.")
    metadata = query.get("user_metadata") or {}
    if not isinstance(metadata, Mapping):
        refuse(f"user_metadata is {metadata!r}, expected an object of texts.")
    mine = _is_mine(query.get("owner") or {"type": "own"}, owner)
    statuses = _statuses(query.get("statuses"))
    words = (display_name or "").casefold().split()

    def named(session: Session) -> bool:
        if session_id is None and display_name is None:
            return True
        name = (session.display_name or "").casefold()
        by_name = display_name is not None and bool(name) and all(word in name for word in words)
        return by_name or session.session_id == session_id

    def matches(session: Session) -> bool:
        return (
            mine
            and named(session)
            and (projects is None or session.project_id in projects)
            and all(session.user_metadata.get(key) == value for key, value in metadata.items())
            and (statuses is None or any(_has_status(session, *status) for status in statuses))
        )

    return matches


def _is_mine(query: Any, owner: str) -> bool:
    kind = query.get("type") if isinstance(query, Mapping) else None
    if kind in ("own", "accessible"):
        return True
    if kind == "user" and _texts(query.get("owner_urns")):
        return owner in query["owner_urns"]
    refuse(f"owner is {query!r}, expected type own, accessible, or user with owner_urns.")


def _statuses(given: Any) -> list[tuple[str, list[str] | None]] | None:
    if given is None:
        return None
    expected = f"expected a list of objects whose type is one of {', '.join(_STATUSES)}"
    if not isinstance(given, list) or not given:
        refuse(f"statuses is {given!r}, {expected}.")
    wanted = []
    for each in given:
        if not isinstance(each, Mapping) or each.get("type") not in _STATUSES:
            refuse(f"statuses is {given!r}, {expected}.")
        kind, reasons = each["type"], each.get("reasons")
        if reasons is not None and not _texts(reasons):
            refuse(f"reasons is {reasons!r}, expected a list of texts.")
        wanted.append((kind, reasons))
    return wanted


def _has_status(session: Session, kind: str, reasons: list[str] | None) -> bool:
    status = status_of(session)
    return status["type"] == kind and (reasons is None or status.get("reason", {}).get("type") in reasons)


def _place(session: Session) -> tuple[str, str]:
    return iso_time(session.created_at), session.session_id


def _cursor(given: Any) -> tuple[str, str] | None:
    if given is None:
        return None
    try:
        at = datetime.fromisoformat(given["last_created_at"])
        return iso_time(at.timestamp()), str(given["last_session_id"])
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        refuse(f"cursor is {given!r}; pass the next_cursor of the page before, unchanged.")


def _text(query: Mapping[str, Any], key: str) -> str | None:
    value = query.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        refuse(f"{key} is {value!r}, expected a text.")
    return value


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
