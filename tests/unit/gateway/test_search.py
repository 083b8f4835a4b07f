"""Searching sessions: every filter, and pages that miss and repeat nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.search import search
from tinker_hpc.gateway.sessions import Session

ME = "urn:tinker_hpc:user:me"


def session(number: int, **fields: Any) -> Session:
    return Session(f"s-{number}", created_at=1000.0 + number // 2, **fields)  # two of each second


def ids(sessions: list[Session], **query: Any) -> list[str]:
    return [found.session_id for found in search(sessions, query, ME)[0]]


SESSIONS = [
    session(1, display_name="Nightly run A", user_metadata={"team": "x", "k": "v"}),
    session(2, display_name="nightly B", project_id="p"),
    session(3, finished={"reason": "errored", "detail": None, "at": 0.0}),
    session(4, finished={"reason": "success", "detail": None, "at": 0.0}, project_id="p"),
]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ["s-4", "s-3", "s-2", "s-1"]),
        ({"session_id": "s-3"}, ["s-3"]),
        ({"session_id": "s-9"}, []),
        ({"display_name": "NIGHTLY a"}, ["s-1"]),
        ({"display_name": "nightly"}, ["s-2", "s-1"]),
        ({"display_name": "nightly b", "session_id": "s-4"}, ["s-4", "s-2"]),
        ({"user_metadata": {"team": "x"}}, ["s-1"]),
        ({"user_metadata": {"team": "x", "k": "w"}}, []),
        ({"project_ids": ["p"]}, ["s-4", "s-2"]),
        ({"project_ids": []}, []),
        ({"statuses": [{"type": "active"}]}, ["s-2", "s-1"]),
        ({"statuses": [{"type": "client_finished"}]}, ["s-4", "s-3"]),
        ({"statuses": [{"type": "client_finished", "reasons": ["errored"]}]}, ["s-3"]),
        ({"statuses": [{"type": "cancelled"}, {"type": "failed"}]}, []),
        ({"owner": {"type": "accessible"}, "limit": 1}, ["s-4"]),
        ({"owner": {"type": "user", "owner_urns": [ME]}, "session_id": "s-1"}, ["s-1"]),
        ({"owner": {"type": "user", "owner_urns": ["urn:other"]}}, []),
    ],
)
def test_filters(query, expected):
    assert ids(SESSIONS, **query) == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7])
def test_pages_are_a_partition(limit):
    sessions = [session(number) for number in range(7)]
    seen, cursor = [], None
    for _ in range(10):
        page, cursor = search(sessions, {"limit": limit, "cursor": cursor}, ME)
        seen += [found.session_id for found in page]
        if cursor is None:
            break
    assert cursor is None and seen == [f"s-{number}" for number in reversed(range(7))]


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 201},
        {"limit": True},
        {"session_id": 3},
        {"display_name": ""},
        {"project_ids": "p"},
        {"user_metadata": ["a"]},
        {"owner": {"type": "nobody"}},
        {"owner": "own"},
        {"statuses": []},
        {"statuses": [3]},
        {"statuses": [{"type": "active", "reasons": 3}]},
        {"cursor": {}},
        {"cursor": {"last_created_at": "yesterday", "last_session_id": "s"}},
        {"cursor": {"last_created_at": "9999-12-31T23:59:59-23:59", "last_session_id": "s"}},
    ],
)
def test_wrong_queries_are_refused_in_words(query):
    with pytest.raises(RequestError, match=r"expected|pass the next_cursor"):
        search(SESSIONS, query, ME)
