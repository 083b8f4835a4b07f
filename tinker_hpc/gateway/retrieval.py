"""Step 7 of a request. Before: gateway/workers.py. After: the SDK's future.

retrieve_future is a long poll: the SDK asks, we hold the question until there is an answer or its patience (45 s) is
nearly used up, then say 408 and it asks again at once. The 408 carries why there is no answer yet; the SDK prints it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tinker_hpc.errors import CorruptLogError, DataRootError, RequestError
from tinker_hpc.gateway import sampling
from tinker_hpc.gateway.answers import Answer, failure
from tinker_hpc.gateway.custom_losses import answer_of_creation
from tinker_hpc.gateway.futures import Future
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import bad_request, unknown
from tinker_hpc.gateway.workers import WorkerLink, Workers
from tinker_hpc.log.looking import LAG_S
from tinker_hpc.patience import passes

HOLD_S = 40.0
# The first answer while the worker waits in the queue comes soon, so that the user reads why; later ones rarely.
FIRST_HOLD_S = 3.0
# Chunks of one call arrive in any order within milliseconds; a gap this old is a request that will never come.
GAP_AFTER_S = 30.0
# The SDK's patience with the question for a whole sampling client is 45 s, too.
TELL_HOLD_S = 30.0
# While the worker waits in the queue, one sample of each sampling client is asked for by itself, to say why.
SCOUT_AFTER_S = 1.0
# Between looks for an answer that was there and is not to be seen now.
LOOK_AGAIN_S = 0.5


class NotYet(Exception):
    """No answer yet; `body` says why (answered as 408)."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body)
        self.body = body


class Retrieval:
    """Answers retrieve_future."""

    def __init__(self, ledger: Ledger, workers: Workers, *, hold_s: float = HOLD_S) -> None:
        self.ledger = ledger
        self.workers = workers
        self.hold_s = hold_s
        self._missed: dict[str, float] = {}  # since when an answer that was there is not to be seen

    async def answer(self, request_id: str, iteration: int) -> Answer:
        """The answer of a request, waiting for it as long as the SDK's patience allows.

        Raises: NotYet; Refusal 404 for an id that was never handed out.
        """
        future = self.ledger.futures.get(request_id)
        if future is None and (answer := answer_of_creation(request_id)) is not None:
            return answer
        if future is None:
            raise unknown(
                f"unknown request {request_id!r}: this gateway never accepted it. Is TINKER_BASE_URL the one the "
                "request was sent to?"
            )
        started = time.monotonic()
        while True:
            finished = await self._finished(future)
            if finished is not None:
                return finished
            hold_s = self.hold_s if iteration > 0 or self._ready(future) else min(FIRST_HOLD_S, self.hold_s)
            left_s = started + hold_s - time.monotonic()
            if left_s <= 0:
                raise NotYet(self._why(future, waited_s=time.monotonic() - started))
            await future.change(min(left_s, LOOK_AGAIN_S) if future.done else left_s)

    async def completions(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Which samples of one sampling client are done: retrieve_futures.

        Raises: Refusal 400 for a body that is none, 404 for a sampler that is not known here.
        """
        try:
            target, cursor, timeout_s, retrieved = sampling.completions(payload)
        except RequestError as error:
            raise bad_request(str(error)) from error
        sampler = self.ledger.samplers.get(target[0])
        if sampler is None:
            raise unknown(f"unknown sampler {target[0]!r}. Samplers belong to one run; create it here first.")
        futures = self.ledger.futures
        for request_id in retrieved:
            future = futures.get(request_id)
            if future is not None and future.target == target:
                futures.release(request_id)
        hold_s = min(TELL_HOLD_S, self.hold_s if timeout_s is None else timeout_s)
        link = self.workers.links[sampler.worker_index]
        started = time.monotonic()
        while True:
            waited_s = time.monotonic() - started
            if link.hopeless() is not None:
                futures.completions.give_up(target)
            elif link.status.phase != "ready" and waited_s >= SCOUT_AFTER_S:
                futures.completions.send_scout(target)
            found, following = futures.completions.after(target, cursor)
            if found or waited_s >= hold_s:
                return {"completions": found, "cursor": following}
            until_s = hold_s if waited_s >= SCOUT_AFTER_S else min(SCOUT_AFTER_S, hold_s)
            await futures.completions.change(target, until_s - waited_s)

    async def _finished(self, future: Future) -> Answer | None:
        kept = self.ledger.futures.answer(future.request_id)
        if kept is not None:
            return kept
        link = self.workers.links[future.worker_index]
        if future.done:
            if "error" in future.facts:
                return failure(future.facts["error"], future.facts["category"])
            return await self._found_again(future, link)
        reason = link.hopeless()
        return None if reason is None else failure(reason, "server")

    async def _found_again(self, future: Future, link: WorkerLink) -> Answer | None:
        """The answer as the result log has it; None while a disk may still show it."""
        found = None
        try:
            if future.where is not None:
                found = await asyncio.to_thread(link.find_answer, future.where, future.facts)
        except DataRootError as error:
            if passes(error):
                return None
            return failure(str(error), "server")
        except CorruptLogError as error:
            return failure(str(error), "server")
        if found is None:  # merged into another file just now, perhaps, and a listing of before
            since = self._missed.setdefault(future.request_id, time.monotonic())
            if future.where is not None and time.monotonic() - since < LAG_S:
                return None
            return failure(f"the result of {future.request_id} was there and cannot be found again", "server")
        self._missed.pop(future.request_id, None)
        self.ledger.futures.keep(future.request_id, found)
        return found

    def _ready(self, future: Future) -> bool:
        return self.workers.links[future.worker_index].status.phase == "ready"

    def _why(self, future: Future, waited_s: float) -> dict[str, Any]:
        body = {"type": "try_again", "request_id": future.request_id, "queue_state": "active"}
        status = self.workers.links[future.worker_index].status
        if status.phase != "ready":
            reason = status.reason or {"queued": "the worker waits in the queue"}.get(status.phase, "the worker starts")
            if status.since is not None:
                reason += f", since {time.strftime('%a %H:%M', time.localtime(status.since))}"
            return {**body, "queue_state": "paused_capacity", "queue_state_reason": reason}
        missing = self.ledger.gap_before(future)
        if missing is not None and waited_s >= min(GAP_AFTER_S, self.hold_s):
            reason = (
                f"request {future.seq_id} of {future.model_id} waits for request {missing}, which this client has not "
                "sent. If a call on this TrainingClient raised before it was sent, nothing after it can run: make a "
                "new client from the last saved state"
            )
            return {**body, "queue_state": "paused_capacity", "queue_state_reason": reason}
        return body
