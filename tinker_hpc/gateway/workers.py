"""One worker as the gateway sees it: the log it writes for it, the results it reads from it, the bell, its status.

A thread per worker waits on the bell and reads; what it finds goes to the event loop in one piece. Nothing here asks
Slurm: whoever started the worker writes its status.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_hpc.base_models import BaseModel, public_name, same_model
from tinker_hpc.base_models import read as read_base_model
from tinker_hpc.errors import DataRootError, TinkerHpcError
from tinker_hpc.gateway.answers import Answer, answer_of
from tinker_hpc.gateway.futures import FutureTable
from tinker_hpc.log import Bell, Lease, LogReader, RequestLog, ResultFinder, ResultReader
from tinker_hpc.log.rewinds import read_rewinds, taken_back
from tinker_hpc.patience import Complaint, passes
from tinker_hpc.private_files import read_json
from tinker_hpc.routing_record import SampledIndex
from tinker_hpc.run_folder import RunFolder, WorkerFolder

STATUS_EVERY_S = 1.0
COMPACT_EVERY_S = 60.0
# The longest the reading thread sleeps with a bell that works: a lost ring costs this much, not for ever.
WAIT_S = 1.0


@dataclass(frozen=True)
class Status:
    """status.json: phase is queued, starting, ready or ended; reason and error are for people."""

    phase: str = "starting"
    reason: str = ""
    error: str | None = None
    since: float | None = None
    """Unix seconds: when it came into this phase."""

    @classmethod
    def read(cls, path: Path) -> Status:
        """The status, or "starting" while nobody has written one (or a filesystem shows half of it)."""
        with contextlib.suppress(OSError, ValueError):
            value = read_json(path)
            if isinstance(value, dict):
                return cls(
                    str(value.get("phase", "starting")),
                    str(value.get("reason") or ""),
                    value.get("error"),
                    value.get("since"),
                )
        return cls()


Found = tuple[str, Answer, tuple[int, int]]
"""A request id, its answer, and where in the result log that is."""
Deliver = Callable[[list[Found], Status, str | None], None]


class WorkerLink:
    """The gateway's end of one worker. Construct and `requests()` in any thread; the rest on the event loop."""

    def __init__(self, folder: WorkerFolder, mapping: Mapping[str, str], lease: Lease) -> None:
        """Open the worker's request log as its only writer.

        Raises: UnknownBaseModelError, CorruptLogError, DataRootError.
        """
        declaration: dict[str, Any] = read_json(folder.declaration) or {}
        self.index = int(folder.path.name)
        self.folder = folder
        self.declared = str(declaration["base_model"])
        self._mapping = mapping
        model_folder = Path(declaration["base_model_folder"])
        self.base: BaseModel = read_base_model(public_name(self.declared, model_folder), model_folder)
        self.log = RequestLog(folder.requests, lease)
        self._finder = ResultFinder(folder.path)
        self.taken_back = taken_back(read_rewinds(folder))
        self.bell = Bell(folder.path, side="gateway")
        self.status = Status.read(folder.status)
        self.trouble: str | None = None
        self.sampled = SampledIndex()
        self.caught_up = False
        """All results that there were when this gateway was started have been read."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def serves(self, name: str) -> bool:
        """Whether `name` means this worker's base model."""
        return name == self.base.name or same_model(name, self.declared, self.base.folder, self._mapping)

    def requests(self) -> Iterator[dict[str, Any]]:
        """Headers of every request in the log, in order. Raises: CorruptLogError, DataRootError."""
        reader, last = LogReader(self.folder.requests, written={"seq": "number"}), self.log.last
        while reader.position < last:
            records = reader.poll(promised=last)
            for record in records:
                yield record.header
            if not records:  # merged away while it was read, or a filesystem that shows it late
                time.sleep(0.1)

    def start(self, loop: asyncio.AbstractEventLoop, futures: FutureTable) -> None:
        """Begin to read results and status."""

        def deliver(answers: list[Found], status: Status, trouble: str | None) -> None:
            for request_id, answer, where in answers:
                futures.finish(request_id, answer, where)
            if (status, trouble) != (self.status, self.trouble):
                self.status, self.trouble = status, trouble
                futures.wake_pending(self.index)

        def from_thread(answers: list[Found], status: Status, trouble: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                loop.call_soon_threadsafe(deliver, answers, status, trouble)

        args = (futures, from_thread)
        self._thread = threading.Thread(target=self._read_results, args=args, name=f"results-{self.index}", daemon=True)
        self._thread.start()
        threading.Thread(target=self._compact_now_and_then, name=f"compact-{self.index}", daemon=True).start()

    def stop(self) -> None:
        """End the reading thread and finish a merge under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * WAIT_S)
        self.log.close()
        self.bell.close()

    def hopeless(self) -> str | None:
        """Why no result will come, or None while one may."""
        if self.trouble is not None:
            return self.trouble
        if self.status.phase == "ended":
            return (
                self.status.error
                or f"the worker of {self.base.name} has ended: {self.status.reason or 'no reason given'}"
            )
        return None

    def find_answer(self, where: tuple[int, int], facts: Mapping[str, Any]) -> Answer | None:
        """Read one answer from the result log again: for those that have left the memory."""
        record = self._finder.find(*where)
        return None if record is None else answer_of(record, facts)

    def compact(self) -> None:
        """Let payloads go that no snapshot of the worker needs (log/request_log.py). Raises: TinkerHpcError."""
        needed = read_json(self.folder.snapshots / "needed.json")
        if needed is not None:
            self.log.compact(needed["position"], frozenset(needed["open"]))

    def _compact_now_and_then(self) -> None:
        while not self._stop.wait(COMPACT_EVERY_S):
            # A full disk or a damaged file: whoever appends or reads says so, and the payloads are good where they are.
            with contextlib.suppress(OSError, TinkerHpcError):
                self.compact()

    def _read_results(self, futures: FutureTable, deliver: Deliver) -> None:
        reader = ResultReader(self.folder.path)
        status, trouble, looked_at = self.status, None, 0.0
        refusal = Complaint()
        while not self._stop.is_set():
            # Status before results: one that says "ended" is believed after everything published before it was read.
            if time.monotonic() - looked_at > STATUS_EVERY_S:
                status, looked_at = Status.read(self.folder.status), time.monotonic()
            answers: list[Found] = []
            more = False
            try:
                records = reader.poll()
                more = bool(records)
                for record in records:
                    request_id = record.header.get("request_id")
                    if request_id is None or "ok" not in record.header:
                        continue  # the worker's own notes
                    future = futures.get(request_id)
                    if future is None:
                        continue  # taken back
                    if "experts" in record.header:
                        self.sampled.add(record.header)
                    where = (record.header["fence"], record.header["number"])
                    answers.append((request_id, answer_of(record, future.facts), where))
                trouble = None
                self.caught_up |= reader.at_end
            except DataRootError as error:
                if passes(error):
                    refusal.say(error)
                    self._stop.wait(WAIT_S)
                    continue
                trouble = f"the results of this run cannot be read: {error}"
            except TinkerHpcError as error:
                trouble = (
                    f"the results of this run cannot be read: {str(error).rstrip('.')}. Bring that file back from a "
                    "snapshot of the filesystem: reading then goes on, every accepted request is still in the log."
                )
            if answers or (status, trouble) != (self.status, self.trouble):
                deliver(answers, status, trouble)
            if not more:
                self.bell.wait(WAIT_S)


class Workers:
    """Every declared worker of the run; new ones are looked for when a base model is asked for that none serves."""

    def __init__(self, run: RunFolder, mapping: Mapping[str, str], lease: Lease) -> None:
        self.run = run
        self._lease = lease
        self._mapping = mapping
        self.links: dict[int, WorkerLink] = {}

    def scan(self) -> list[WorkerLink]:
        """Open the workers declared since the last scan, without starting them. Reads the disk."""
        fresh = []
        for folder in self.run.workers():
            if int(folder.path.name) not in self.links:
                link = WorkerLink(folder, self._mapping, self._lease)
                self.links[link.index] = link
                fresh.append(link)
        return fresh

    def serving(self, base_model: str) -> WorkerLink | None:
        """The worker of that base model, if there is one."""
        return next((link for link in self.links.values() if link.serves(base_model)), None)

    def names(self) -> str:
        """The base models of this run, for messages."""
        return ", ".join(repr(link.base.name) for link in self.links.values()) or "none"
