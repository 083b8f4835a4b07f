"""A disk that is full, over quota or away for a while: wait, say so, go on. It must not end a training run."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from tinker_hpc.errors import DataRootError
from tinker_hpc.run_folder import write_bytes

_T = TypeVar("_T")
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
_SAY_EVERY_S = 60.0
_PAUSE_S = 1.0
_ROOM_BYTES = 1 << 18


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


def words_may_be_lost() -> None:
    """From here on this process goes on where what it says cannot be written.

    The logs of a job lie on the disk it waits for: saying that it is full must not be what ends the process.
    """
    sys.stdout, sys.stderr = (cast(TextIO, _Words(stream)) for stream in (sys.stdout, sys.stderr))


class _Words:
    """A text stream that drops what the disk refuses for a while."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            if not passes(error):
                raise
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            if not passes(error):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def until_there_is_room(folder: Path) -> None:
    """Wait until a small file can be written in a folder: for a process that cannot wait by itself."""

    def write() -> None:
        path = folder / f".room-{os.getpid()}"
        try:
            write_bytes(path, b"\0" * _ROOM_BYTES)
        finally:
            path.unlink(missing_ok=True)

    until_written(write)
