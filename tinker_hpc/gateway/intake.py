"""Step 3 of a request. Before: gateway/desk.py. After: log/request_log.py.

Accepts a record once: the request id is reserved, the record made durable, and only then is the caller answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tinker_hpc.errors import DataRootError
from tinker_hpc.gateway.futures import Future
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import Refusal, conflicting, try_again
from tinker_hpc.gateway.workers import WorkerLink
from tinker_hpc.log import Record

# Appends that wait for one sync together share the next one, so many threads cost few syncs.
APPEND_THREADS = 32


class Intake:
    """Durable and idempotent acceptance."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.pool = ThreadPoolExecutor(APPEND_THREADS, thread_name_prefix="append")

    async def accept(
        self, link: WorkerLink, header: dict[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> Future:
        """Write the record, or find that it was written before.

        Raises: Refusal 422 if the request id is taken by another payload; 503 if the disk refuses (nothing is
            accepted then, and the SDK tries again for 300 s).
        """
        known = self.ledger.futures.get(header["request_id"])
        if known is not None:
            if known.digest != header["digest"]:
                raise conflicting(
                    f"request {known.request_id} was accepted before as {known.op} with another payload. A request is "
                    "run once; a changed one needs a new number. Is a second client using the same ids?"
                )
            if known.durable is not None:
                await asyncio.shield(known.durable)
            return known
        if self.ledger.closed:
            raise Refusal(422, "this run is closing: its loop has ended, nothing more is accepted. Start a new run.")
        loop = asyncio.get_running_loop()
        future = self.ledger.enter(header, link.index)
        future.durable = loop.create_future()
        try:
            await loop.run_in_executor(self.pool, link.log.append, [Record(header, arrays or {})])
        except BaseException as error:
            self.ledger.futures.drop(future)
            refusal = _refusal(error)
            future.durable.set_exception(refusal)
            with contextlib.suppress(Refusal):  # retrieved here, in case nobody else waits
                future.durable.exception()
            raise refusal from error
        link.bell.ring()
        self.ledger.apply(header, link.index)
        future.durable.set_result(None)
        future.durable = None
        return future

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
                await loop.run_in_executor(self.pool, link.log.append, [Record(header)])
                link.bell.ring()
        except DataRootError as error:
            self.ledger.closed = False
            raise try_again(f"the run could not be closed: {error}") from error


def _refusal(error: BaseException) -> Refusal:
    if isinstance(error, DataRootError):
        return try_again(f"nothing was accepted: {error} The SDK tries again for 5 minutes.")
    return Refusal(500, f"nothing was accepted: {type(error).__name__}: {error}")
