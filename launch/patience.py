"""A disk that is full, over quota or away for a while: wait, say so, go on. It must not end a training run."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from tinker_hpc.errors import DataRootError

_T = TypeVar("_T")
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
_SAY_EVERY_S = 60.0
_PAUSE_S = 1.0


def passes(error: OSError) -> bool:
    """Whether an error is of the disk's and may pass (pure). Ours carry the disk's own as their cause."""
    cause = error.__cause__ if isinstance(error, DataRootError) else error
    return isinstance(cause, OSError) and cause.errno in _PASSING


def until_written(action: Callable[[], _T], *, sleep: Callable[[float], None] = time.sleep) -> _T:
    """Do something that writes, again and again while the disk refuses. Raises what will not pass."""
    said_at: float | None = None
    while True:
        try:
            return action()
        except OSError as error:
            if not passes(error):
                raise
            now = time.monotonic()
            if said_at is None or now - said_at >= _SAY_EVERY_S:
                said_at = now
                print(f"tinker_hpc: the disk refuses ({error}); trying again until it does not", flush=True)
            sleep(_PAUSE_S)
