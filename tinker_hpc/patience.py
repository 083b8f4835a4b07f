"""A disk that is full, over quota or away for a while: wait, say so, go on. It must not end a training run."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from tinker_hpc.errors import DataRootError
from tinker_hpc.private_files import write_bytes

_T = TypeVar("_T")
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
_SAY_EVERY_S = 60.0
_PAUSE_S = 1.0
_ROOM_BYTES = 1 << 18


def passes(error: OSError) -> bool:
    """Whether an error is of the disk's and may pass (pure)."""
    return number_of(error) in _PASSING


def number_of(error: OSError) -> int | None:
    """Its errno (pure). Ours carry the disk's own error as their cause."""
    cause = error.__cause__ if isinstance(error, DataRootError) else error
    return cause.errno if isinstance(cause, OSError) else None


def until_written(action: Callable[[], _T], *, sleep: Callable[[float], None] = time.sleep) -> _T:
    """Do something that writes, again and again while the disk refuses. Raises what will not pass."""
    complaint = Complaint()
    while True:
        try:
            return action()
        except OSError as error:
            if not passes(error):
                raise
            complaint.say(error)
            sleep(_PAUSE_S)


class Wait:
    """For what must not wait for ever: `once` after each refusal."""

    def __init__(self, patience_s: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._until = time.monotonic() + patience_s
        self._sleep = sleep
        self._complaint = Complaint()

    def once(self, error: OSError) -> bool:
        """Say what the disk said and pause; False if that will not pass, or has not for too long."""
        if not passes(error) or time.monotonic() >= self._until:
            return False
        self._complaint.say(error)
        self._sleep(_PAUSE_S)
        return True


class Complaint:
    """Says that the disk refuses, once a minute however often it does."""

    def __init__(self) -> None:
        self._said_at: float | None = None

    def say(self, error: OSError) -> None:
        now = time.monotonic()
        if self._said_at is None or now - self._said_at >= _SAY_EVERY_S:
            self._said_at = now
            print(f"tinker_hpc: the disk refuses ({error}); trying again until it does not", flush=True)

    @contextlib.contextmanager
    def instead(self) -> Iterator[None]:
        """Say what the disk refuses inside instead of raising it: for a step that is taken again soon anyway."""
        try:
            yield
        except OSError as error:
            if not passes(error):
                raise
            self.say(error)


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
    until_written(lambda: need_room(folder))


def need_room(folder: Path) -> None:
    """See that a small file can be written in a folder. Raises: DataRootError."""
    path = folder / f".room-{os.getpid()}"
    try:
        write_bytes(path, b"\0" * _ROOM_BYTES)
    finally:
        path.unlink(missing_ok=True)
