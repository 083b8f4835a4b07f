"""A session's timeline, from what its run's logs say: when each request was accepted, computed and done.

The trace-event JSON that ui.perfetto.dev and chrome://tracing open: one track a model or sampler, and on it two slices
a request, `queued` (accepted until computed) and the operation itself (one for a sample). Times are microseconds since
1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinker_hpc.gateway.wire import json_bytes
from tinker_hpc.gateway.workers import WorkerLink
from tinker_hpc.log import ResultReader
from tinker_hpc.private_files import make_private, write_bytes


def export(links: Iterable[WorkerLink], session_id: str, folder: Path) -> Path:
    """Read the logs and write the trace of that session; the file. Raises: DataRootError, CorruptLogError."""
    events: list[dict[str, Any]] = []
    for link in links:
        requests = [header for header in link.requests() if belongs(header, session_id)]
        wanted = {header["request_id"] for header in requests}
        results: dict[str, Mapping[str, Any]] = {}
        reader = ResultReader(link.folder.path)
        while records := reader.poll():
            for record in records:
                if record.header.get("request_id") in wanted and "ok" in record.header:
                    results.setdefault(record.header["request_id"], record.header)
        events += trace_events(requests, results, process=link.index, process_name=link.base.name)
    path = make_private(folder) / f"{session_id}.pftrace"
    write_bytes(path, json_bytes({"traceEvents": events, "displayTimeUnit": "ms"}))
    return path


def belongs(header: Mapping[str, Any], session_id: str) -> bool:
    """Whether a request is of that session: its model or its sampler is named after it."""
    names = (header.get("model_id"), header.get("sampling_session_id"))
    return any(isinstance(name, str) and name.startswith(f"{session_id}:") for name in names)


def trace_events(
    requests: Iterable[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
    *,
    process: int,
    process_name: str,
) -> Iterator[dict[str, Any]]:
    """Events of one worker. A request without a result yet has an instant event only."""
    tracks: dict[str, int] = {}
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": process_name}}
    for header in requests:
        owner = str(header.get("model_id") or header.get("sampling_session_id"))
        if owner not in tracks:
            tracks[owner] = len(tracks) + 1
            named = {"name": owner}
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": tracks[owner], "args": named}
        op = str(header.get("asked") or header["op"])
        about = {"request_id": header["request_id"], "seq_id": header.get("seq_id")}
        where = {"pid": process, "tid": tracks[owner], "cat": op}
        accepted = float(header["accepted_at"])
        result = results.get(header["request_id"])
        if result is None or result.get("finished_at") is None:
            state = {"error": header["error"]} if header["op"] == "rejected" else {"state": "no result yet"}
            yield {"ph": "i", "s": "t", "name": op, "ts": _us(accepted), **where, "args": {**about, **state}}
            continue
        finished = max(accepted, float(result["finished_at"]))
        if not result.get("ok"):
            about["error"] = result.get("error")
        started = accepted
        if result.get("compute_s") is not None:  # not known of a sample: it shares its steps with others
            started = min(finished, max(accepted, finished - float(result["compute_s"])))
            yield _slice("queued", accepted, started, where, about)
        yield _slice(op, started, finished, where, about)


def _slice(name: str, start: float, end: float, where: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": _us(start), "dur": _us(end) - _us(start), **where, "args": dict(args)}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
