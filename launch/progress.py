"""Did a job bring its run forward? Seen from the logs alone, so that a job killed without a word counts too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tinker_hpc.private_files import read_json
from tinker_hpc.run_folder import RunFolder, WorkerFolder

Credit = Literal["answers", "ready", "waiting"]
"""What counts as progress: answers of the worker in the job; for a worker without a loop that it took requests, for it
may have had none to answer; for a loop without a worker new requests, or that its worker waits in the queue."""

_END = 1 << 62


def credit_of(kind: str) -> Credit:
    """What counts for a job of that kind (job_spec.py)."""
    credits: dict[str, Credit] = {"session": "ready", "driver": "waiting"}
    return credits.get(kind, "answers")


def marks(run_folder: RunFolder) -> dict[str, Any]:
    """Where the logs of the run's workers stand now: the newest fence and the last request, by worker."""
    workers = _workers(run_folder)
    return {
        "fences": {name: max(_fences(worker), default=0) for name, worker in workers.items()},
        "requests": {name: _last_request(worker) for name, worker in workers.items()},
    }


def is_ready(run_folder: RunFolder, since: Mapping[str, Any], index: int = 0) -> bool:
    """Whether a worker started after those marks takes requests: its first words in the result log say so."""
    before = int((since.get("fences") or {}).get(str(index), 0))
    return any(fence > before for fence in _fences(run_folder.worker(index)))


def made(run_folder: RunFolder, since: Mapping[str, Any], until: Mapping[str, Any], *, credit: Credit) -> bool:
    """Whether there was progress between two marks (`until` empty: up to now).

    There was if a worker started in between published an answer. What precedes its first answer is short, so this
    reads little. A loop whose workers are other jobs went forward if it asked something new.
    """
    for name, worker in _workers(run_folder).items():
        low = int((since.get("fences") or {}).get(name, 0))
        high = int((until.get("fences") or {}).get(name, _END))
        started = [fence for fence in _fences(worker) if low < fence <= high]
        if credit == "ready" and started:
            return True
        if credit == "waiting" and (read_json(worker.status) or {}).get("phase") == "queued":
            return True
        if any(_has_answer(worker.results / f"{fence:08d}") for fence in started):
            return True
        asked = int((until.get("requests") or {}).get(name, _last_request(worker)))
        if worker.path.is_symlink() and asked > int((since.get("requests") or {}).get(name, 0)):
            return True
    return False


def _has_answer(folder: Path) -> bool:
    from tinker_hpc.log import LogReader  # numpy: what only asks for states need not load it
    from tinker_hpc.log.segment import list_segments

    segments = list_segments(folder)
    if segments and segments[0].first > 1:
        return True  # compacted: nobody compacts a log without answers
    reader = LogReader(folder)
    while records := reader.poll(1 << 20):
        if any(record.header.get("ok") for record in records):
            return True
    return False


def _workers(run_folder: RunFolder) -> dict[str, WorkerFolder]:
    try:
        names = sorted(name for name in os.listdir(run_folder.path / "workers") if name.isdigit())
    except FileNotFoundError:
        return {}
    return {name: run_folder.worker(int(name)) for name in names}


def _fences(worker: WorkerFolder) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(worker.results) if name.isdigit())
    except FileNotFoundError:
        return []


def _last_request(worker: WorkerFolder) -> int:
    from tinker_hpc.log.segment import list_segments

    return max((segment.last for segment in list_segments(worker.requests)), default=0)
