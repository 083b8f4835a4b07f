"""A loop that was started again begins at its beginning: it is given the recorded answers until it asks something new.

Its SDK numbers what it asks as the first one's did, so the same request has the same id, and the intake answers it like
any retry. What this module adds:

- which start of the loop asks now (loop.json), and which recorded requests it has asked for again (*claimed*);
- what to do when it asks something *else* under a recorded id: it left the recorded path. The recorded requests from
  there on that it has not claimed are taken back, in every worker's log (log/rewinds.py): the worker goes back to its
  state before them, and training continues from there. Ids that were taken back get a suffix `~1`, `~2`, ... when they
  are used again, because results of the old ones are in the result log.

A loop that resumes by itself (from a checkpoint it saved) does just that: its first request differs, everything
recorded is taken back, and it goes on from its own checkpoint.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
from collections.abc import Iterable

from tinker_hpc.gateway.futures import Future
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import Refusal, try_again
from tinker_hpc.gateway.workers import WorkerLink, Workers
from tinker_hpc.log import Record
from tinker_hpc.log.rewinds import Rewind, add_rewind, read_rewinds
from tinker_hpc.private_files import PRIVATE_FILE, read_json
from tinker_hpc.run_folder import RunFolder

log = logging.getLogger(__name__)


class Replay:
    """Lives on the event loop."""

    def __init__(self, run: RunFolder, ledger: Ledger, workers: Workers) -> None:
        self._run = run
        self._ledger = ledger
        self._workers = workers
        self.start = run.loop_starts()
        """Which start of the loop is asking; 0 where nobody counts."""
        self._claims: int | None = None

    def restore(self) -> None:
        """After the logs were read: which recorded requests were claimed before this gateway was started."""
        try:
            lines = self._run.claims.read_text().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                claim = json.loads(line)
            except ValueError:  # empty, or cut short by a kill or a full disk: that one was not answered
                continue
            future = self._ledger.futures.get(claim["request_id"])
            if future is not None:
                future.loop_start = max(future.loop_start, claim["start"])

    async def look(self) -> None:
        """Called when a session is opened, the first thing any loop does: is it a new start?

        Raises: DataRootError if a closed run cannot be opened again.
        """
        start = await asyncio.to_thread(self._run.loop_starts)
        if start > self.start and self._ledger.closed:
            await self._reopen(start)
        self.start = start

    def claim(self, future: Future) -> None:
        """The loop of now has asked for this recorded request. Raises: Refusal 503 if the disk refuses."""
        if future.loop_start >= self.start:
            return
        self._write_claim(future)
        future.loop_start = self.start
        if future.target is not None:
            completions = self._ledger.futures.completions
            (completions.again if future.done else completions.expect)(future.target, future.request_id)

    def _write_claim(self, future: Future) -> None:
        # No fsync: a node that dies takes the loop with it, and then there is nothing to remember. The line begins
        # with its end: what a full disk cut short is a line of its own.
        line = json.dumps({"start": self.start, "request_id": future.request_id})
        try:
            if self._claims is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._claims = os.open(self._run.claims, flags, PRIVATE_FILE)
            data = f"\n{line}\n".encode()
            if os.write(self._claims, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise try_again(
                f"that {future.request_id} was asked for again cannot be written to {self._run.claims}: "
                f"{error.strerror}. The SDK tries again for 5 minutes."
            ) from error

    def is_recorded(self, future: Future) -> bool:
        """Whether it was asked by an earlier start of the loop, and not by this one."""
        return future.loop_start < self.start

    async def rewind(self, left_at: Future, asked: str) -> None:
        """Take back `left_at` and everything after it that the loop of now has not claimed.

        Raises: Refusal 422 if the state at that point is not kept any more; DataRootError.
        """
        lost = self.after(left_at)
        where = f"request {left_at.seq_id} of {left_at.model_id or left_at.request_id}"
        for index, futures in lost.items():
            if futures and not await asyncio.to_thread(_is_reachable, self._workers.links[index], _seqs(futures)):
                raise Refusal(
                    422,
                    f"this loop was started again and asks something else at {where} than the one before it. The state "
                    "at that point is not kept any more: its part of the log is compacted. Start a new run from the "
                    "last saved state, or give the loop the seeds and data it had.",
                )
        reason = (
            f"the loop was started again (start {self.start}) and left the recorded path at {where}: recorded is "
            f"{left_at.op}, it asked {asked}, or the same with other contents. {sum(map(len, lost.values()))} recorded "
            "requests from there on are dropped; training continues from the state before them."
        )
        log.warning("%s", reason)
        for index, futures in lost.items():
            if futures:
                await asyncio.to_thread(_take_back, self._workers.links[index], _seqs(futures), reason)
                self._ledger.take_back(futures)

    def after(self, left_at: Future) -> dict[int, list[Future]]:
        """What a rewind to before `left_at` takes back, by worker: in its own log by position, in others by time."""
        lost: dict[int, list[Future]] = {index: [] for index in self._workers.links}
        for future in self._ledger.futures:
            later = (
                future.seq >= left_at.seq
                if future.worker_index == left_at.worker_index
                else future.accepted_at >= left_at.accepted_at
            )
            if later and self.is_recorded(future):
                lost[future.worker_index].append(future)
        return lost

    async def _reopen(self, start: int) -> None:
        """A run that was closed goes on: take the `close` records back."""
        for index, seqs in self._ledger.closed_at.items():
            reason = f"the run was closed before and goes on (start {start} of the loop)"
            await asyncio.to_thread(_take_back, self._workers.links[index], seqs, reason)
        self._ledger.closed_at.clear()
        self._ledger.closed = False


def tell_again(link: WorkerLink, told: Iterable[int]) -> None:
    """Append the records of rewinds that a killed gateway did not come to append. Raises: DataRootError."""
    for rewind in read_rewinds(link.folder):
        if rewind.number not in set(told):
            link.log.append([_record(rewind)])


def _take_back(link: WorkerLink, seqs: list[int], reason: str) -> None:
    link.log.append([_record(add_rewind(link.folder, seqs, reason))])
    link.bell.ring()


def _is_reachable(link: WorkerLink, lost: list[int]) -> bool:
    """Whether the worker can get to its state without these: all payloads are there, or a snapshot before them is."""
    compacted = link.log.compacted
    if compacted == 0:
        return True
    for path in link.folder.snapshots.glob("[0-9]*/snapshot.json"):
        content = read_json(path)
        if content is None or content["position"] < compacted:
            continue
        if not any(seq <= content["position"] and seq not in content["open"] for seq in lost):
            return True
    return False


def _seqs(futures: Iterable[Future]) -> list[int]:
    return [future.seq for future in futures]


def _record(rewind: Rewind) -> Record:
    header = {"request_id": f"rewind:{rewind.number}", "op": "rewind", "number": rewind.number}
    rest = {"model_id": None, "seq_id": None, "digest": "", "accepted_at": rewind.at, "reason": rewind.reason}
    return Record({**header, **rest})
