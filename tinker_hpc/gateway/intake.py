"""Step 3 of a request. Before: gateway/models.py, training.py, samplers.py. After: log/request_log.py.

Accepts a record once: the request id is reserved, the record made durable, and only then is the caller answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tinker_hpc.errors import DataRootError, LeaseLostError
from tinker_hpc.gateway.futures import Future
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import Refusal, conflicting, try_again
from tinker_hpc.gateway.replay import Replay
from tinker_hpc.gateway.workers import WorkerLink
from tinker_hpc.log import Record

# Appends that wait for one sync together share the next one, so many threads cost few syncs.
APPEND_THREADS = 32


class Intake:
    """Durable and idempotent acceptance."""

    def __init__(self, ledger: Ledger, replay: Replay) -> None:
        self.ledger = ledger
        self.replay = replay
        self._rewinding: asyncio.Future[None] | None = None
        self.on_superseded: Callable[[str], None] = lambda reason: None
        """Called when another gateway writes this run's logs: this one must end."""
        self.pool = ThreadPoolExecutor(APPEND_THREADS, thread_name_prefix="append")

    async def accept(
        self, link: WorkerLink, header: dict[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> Future:
        """Write the record, or find that it was written before, by this start of the loop or by an earlier one.

        A record that readers may see although the disk did not promise to keep it is written again when the SDK tries
        again; the worker, which may have run it, runs it once.

        Raises: Refusal 422 if the request id is taken by another payload; 503 if the disk refuses (nothing is
            accepted then, and the SDK tries again for 300 s).
        """
        while self._rewinding is not None:
            await asyncio.shield(self._rewinding)
        base_id = header["request_id"]
        known = self.ledger.futures.get(self.ledger.request_id(base_id))
        if known is not None and known.digest != header["digest"]:
            if not self.replay.is_recorded(known):
                raise conflicting(
                    f"request {known.request_id} was accepted before as {known.op} with another payload. A request is "
                    "run once; a changed one needs a new number. Is a second client using the same ids?"
                )
            await self._leave_recorded_path(known, header["op"])
            known = None
        if known is not None and not known.unclear:
            if known.durable is not None:
                await asyncio.shield(known.durable)
            self.replay.claim(known)
            return known
        header = {**header, "request_id": self.ledger.request_id(base_id), "loop_start": self.replay.start}
        if self.ledger.closed:
            raise Refusal(422, "this run is closing: its loop has ended, nothing more is accepted. Start a new run.")
        loop = asyncio.get_running_loop()
        future = known or self.ledger.enter(header, link.index)
        future.durable = loop.create_future()
        try:
            (seq,) = await loop.run_in_executor(self.pool, link.log.append, [Record(header, arrays or {})])
        except BaseException as error:
            if isinstance(error, DataRootError) and error.attributes.get("visible"):
                future.seq = future.seq or error.attributes["seqs"][0]
            if future.seq == 0:
                self.ledger.futures.drop(future)
            refusal = self._refusal(error)
            future.durable.set_exception(refusal)
            with contextlib.suppress(Refusal):  # retrieved here, in case nobody else waits
                future.durable.exception()
            raise refusal from error
        link.bell.ring()
        self.ledger.apply({**header, "seq": seq}, link.index)
        future.durable.set_result(None)
        future.durable = None
        if known is not None:
            self.replay.claim(known)
        return future

    async def _leave_recorded_path(self, known: Future, asked: str) -> None:
        """What was recorded from `known` on goes; nothing else is accepted meanwhile."""
        self._rewinding = asyncio.get_running_loop().create_future()
        try:
            await self.replay.rewind(known, asked)
        except (DataRootError, LeaseLostError) as error:
            raise self._refusal(error) from error
        finally:
            self._rewinding.set_result(None)
            self._rewinding = None

    async def close(self, links: list[WorkerLink], accepted_at: float) -> None:
        """Append the `close` record to every worker's log, once."""
        if self.ledger.closed:
            return
        loop = asyncio.get_running_loop()
        self.ledger.closed = True
        header = {
            "request_id": "close",
            "op": "close",
            "model_id": None,
            "seq_id": None,
            "digest": "",
            "accepted_at": accepted_at,
        }
        try:
            for link in links:
                (seq,) = await loop.run_in_executor(self.pool, link.log.append, [Record(header)])
                self.ledger.apply({**header, "seq": seq}, link.index)
                link.bell.ring()
        except (DataRootError, LeaseLostError) as error:
            self.ledger.closed = False
            raise try_again(f"the run could not be closed: {error}") from error

    def _refusal(self, error: BaseException) -> Refusal:
        if isinstance(error, LeaseLostError):
            self.on_superseded(str(error))
            return try_again(f"nothing was accepted: {error}")
        if isinstance(error, DataRootError):
            what = "this is not safe on the disk yet" if error.attributes.get("visible") else "nothing was accepted"
            return try_again(f"{what}: {error} The SDK tries again for 5 minutes.")
        return Refusal(500, f"nothing was accepted: {type(error).__name__}: {error}")
