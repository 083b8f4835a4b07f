"""How rank 0 tells the other ranks what to do, and how all agree whether it worked. Encoded records, no pickle."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_adapters.out_of_memory import is_out_of_memory
from tinker_hpc.errors import ConfigError, DataRootError, RequestError, ShapeError, WeightsError
from tinker_hpc.log import Record, encode
from tinker_hpc.log.record import decode_all
from tinker_hpc.patience import number_of

AGREE_TIMEOUT = timedelta(seconds=60)
"""A rank that failed waits this long for the others; if they hang in the collective that it left, it ends itself, and
torch's elastic agent starts all ranks again."""

_USER_ERRORS = (RequestError, ShapeError, WeightsError, ConfigError)


@dataclass(frozen=True)
class Failure:
    """Why a request failed, as its result says it."""

    category: Literal["user", "server"]
    message: str
    out_of_memory: bool = False
    """A smaller piece of the same work may fit."""


class EndWorker(BaseException):
    """Ends this rank, as KeyboardInterrupt would: not the failure of a request, so `except Exception` lets it pass."""

    def __init__(self, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.failure = failure
        """Where ranks parted over a request: what to answer before ending."""


def describe(error: Exception) -> Failure:
    """What the user hears of an exception: their own mistakes plainly, ours with the type.

    Raises: EndWorker if it has left this rank's GPU of no use.
    """
    if is_out_of_memory(error):
        return Failure("server", f"{type(error).__name__}: {error}", out_of_memory=True)
    if isinstance(error, _USER_ERRORS):
        return Failure("user", str(error))
    if isinstance(error, DataRootError):
        return Failure("server", str(error))
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        advice = "Look at space, quota and permissions under the data root, then try again."
        return Failure("server", f"{error.strerror}{where}. {advice}")
    _end_without_gpu(error)
    return Failure("server", f"{type(error).__name__}: {error}")


def _end_without_gpu(error: Exception) -> None:
    """After an illegal access, a failed assertion or an error of its memory a GPU answers this process with the same
    error for ever; a new process may have it back. The request that met it is run again, as after a kill: it may be the
    hardware's fault.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.current_stream().query()  # not synchronize: what is under way may wait for another rank for ever
    except RuntimeError as device_error:
        raise EndWorker(f"this rank's GPU does not answer any more: {device_error}; request: {error}") from error


class Ranks:
    """The ranks of this worker, over a gloo group of them all.

    Args: in_place: whether they go on where all ran out of memory. On CUDA, ranks that compute together cannot: NCCL
        does not hold up the host, so one may have launched operations of which another ran out of memory before its
        part. They would be matched with later ones: a hang, or wrong numbers.
    """

    def __init__(
        self, control_group: dist.ProcessGroup | None, global_rank: int, world_size: int, *, in_place: bool = True
    ) -> None:
        self._group = control_group
        self.rank = global_rank
        self.world_size = world_size
        self._in_place = in_place

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, records: Sequence[Record] | None, *, source: int = 0) -> list[Record]:
        """The records that rank `source` gives, on every rank. The others pass None.

        Collectives: over the control group a broadcast of the length and, unless that is 0, one of the bytes.
        """
        if self.world_size == 1:
            return list(records or ())
        if self.rank == source:
            data = bytearray().join(encode(record) for record in records or ())
            dist.broadcast(torch.tensor([len(data)]), src=source, group=self._group)
            if data:
                dist.broadcast(torch.from_numpy(np.frombuffer(data, np.uint8)), src=source, group=self._group)
            return list(records or ())
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, src=source, group=self._group)
        received = np.empty(int(length.item()), np.uint8)
        if received.size:
            dist.broadcast(torch.from_numpy(received), src=source, group=self._group)
        return list(decode_all(received.data, where=f"rank {source}'s broadcast"))

    def agree(self, failure: Failure | None) -> Failure | None:
        """The failure of the first rank that has one, on every rank; None if all succeeded.

        Raises: EndWorker if some failed and some did not: their states differ now, all must start again. On every rank
            if all get here, else on those that failed. Also if all ran out of memory and cannot go on in place.
        Collectives: over the control group one all-gather of a flag and, after a failure, one broadcast.
        """
        if self.world_size == 1:
            return failure
        flags = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        work = dist.all_gather(flags, torch.tensor([int(failure is not None)]), group=self._group, async_op=True)
        assert work is not None
        if failure is None:
            work.wait()
        else:
            asked_at = time.monotonic()
            try:
                work.wait(AGREE_TIMEOUT)
            except RuntimeError as error:
                if time.monotonic() - asked_at < 0.9 * AGREE_TIMEOUT.total_seconds():
                    # Another rank is gone, which may be all that went wrong here: the request is to be run again.
                    raise EndWorker(f"another rank ended; what this one saw of it: {failure.message}") from error
                # The others are there and hang in the collective that this rank left.
                raise EndWorker(f"rank {self.rank} failed alone: {failure.message}", failure) from error
        failed = [rank for rank, flag in enumerate(flags) if flag.item()]
        if not failed:
            return None
        mine = None if failure is None else [Record(asdict(failure))]
        header = self.broadcast(mine if self.rank == failed[0] else None, source=failed[0])[0].header
        agreed = Failure(**header)
        if len(failed) < self.world_size:
            where = ", ".join(map(str, failed))
            raise EndWorker(f"rank {where} of {self.world_size} failed alone: {agreed.message}", agreed)
        if agreed.out_of_memory and not self._in_place:
            raise EndWorker(f"all ranks ran out of memory while they computed together: {agreed.message}", agreed)
        return agreed

    def require_equal(self, flags: Sequence[bool]) -> None:
        """Raises: EndWorker, on every rank, if the flags of the ranks differ: so do their states then.

        Collectives: over the control group one all-gather.
        """
        if self.world_size == 1:
            return
        mine = torch.tensor(flags, dtype=torch.int64)
        everyones = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyones, mine, group=self._group)
        if any(not torch.equal(theirs, everyones[0]) for theirs in everyones):
            raise EndWorker(f"the ranks disagree over which passes failed: {[t.tolist() for t in everyones]}")

    def on_all(self, action: Callable[[], Any]) -> Failure | None:
        """Run `action` on every rank. Returns why it failed on all of them, None if it did on none.

        Raises: EndWorker if it failed on some alone.
        Collectives: those of `action`, then one `agree`.
        """
        failure = None
        try:
            action()
        except Exception as error:
            failure = describe(error)
            if failure.category == "server" and not failure.out_of_memory:
                traceback.print_exc()
        return self.agree(failure)

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 alone; every rank returns its result (JSON values) or raises its error.

        Raises: RequestError for a user's mistake; DataRootError for a failing disk; otherwise RuntimeError, with the
            same message on every rank.
        Collectives: one broadcast over the control group.
        """
        if self.world_size == 1:
            return action()
        outcome = None
        if self.is_first:
            try:
                outcome = [Record({"result": json.dumps(action())})]
            except Exception as error:
                failure = describe(error)
                disk = number_of(error) or 0 if isinstance(error, OSError) else None
                outcome = [Record({"category": failure.category, "message": failure.message, "disk": disk})]
        header = self.broadcast(outcome)[0].header
        if "result" in header:
            return json.loads(header["result"])
        if header["category"] == "user":
            raise RequestError(header["message"])
        if header["disk"] is not None:
            raise DataRootError(header["message"]) from OSError(header["disk"], header["message"])
        raise RuntimeError(header["message"])
