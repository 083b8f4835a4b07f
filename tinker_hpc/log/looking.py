"""Looking into a folder that another node writes, through a filesystem client that caches.

    newest      as long as the highest number given out, a byte each     lease/, results/
    contents    the names of the segments beside it, with a checksum     requests/, results/<fence>/

A client of NFS believes what it knows of a folder, its listing and that a name is missing alike, for up to a minute
(acdirmax in nfs(5)), however often it is asked. Two things it does not answer from memory:

- opening a file that is there asks the server whether it has changed (close-to-open). So a writer tells what is new in
  a file that it writes *in place*: a file replaced by rename is another one, and a client may still know the old one.
- a folder in which this client has just changed something is listed anew: its attributes no longer fit.

Both only bring news sooner and hide nothing: what they say is added to what a listing says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import zlib
from collections.abc import Sequence
from pathlib import Path

from tinker_hpc.errors import DataRootError
from tinker_hpc.private_files import PRIVATE_FILE

NEWEST = "newest"
CONTENTS = "contents"
TEMPORARY = ".tmp-"
MOST_NAMES = 256
"""told in `contents`, the latest; older ones have been listed long ago"""
LAG_S = 90.0
"""What is not to be seen after this long is not there: longer than any client believes what it knows."""
_GONE = (errno.ENOENT, errno.ESTALE)


def list_names(folder: Path) -> list[str]:
    """The names in a folder, [] if it does not exist (yet). Raises: DataRootError if it cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in _GONE:
            return []
        raise _cannot("list", folder, error) from error


def list_anew(folder: Path) -> list[str]:
    """The same as the server has it now: for who takes the folder over, and would otherwise count too little.

    Raises: DataRootError if nothing can be written there.
    """
    probe = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot("write in", folder, error) from error
    listed = list_names(folder)
    # Where even that does not help: names that were told, each looked up for the first time.
    return listed + [name for name in set(names_told(folder)) - set(listed) if (folder / name).exists()]


def tell_newest(folder: Path, number: int) -> None:
    """Number `number` (from 1) was given out. Any order: it never takes a higher one back. Raises: DataRootError."""
    try:
        descriptor = os.open(folder / NEWEST, os.O_WRONLY | os.O_CREAT, PRIVATE_FILE)
        try:
            os.pwrite(descriptor, b"\n", number - 1)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _cannot("write", folder / NEWEST, error) from error


def newest_told(folder: Path) -> int:
    """The highest number that `tell_newest` was called with, 0 if none is. Raises: DataRootError."""
    try:
        descriptor = os.open(folder / NEWEST, os.O_RDONLY)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _GONE:
            return 0
        raise _cannot("read", folder / NEWEST, error) from error


def tell_names(folder: Path, names: Sequence[str]) -> None:
    """Say which names are there. A disk that refuses costs readers a moment, not the writer anything."""
    text = "\n".join(names[-MOST_NAMES:]).encode()
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / CONTENTS, os.O_WRONLY | os.O_CREAT, PRIVATE_FILE)
        try:
            os.pwrite(descriptor, b"%08x %08x\n%s" % (len(text), zlib.crc32(text), text), 0)
        finally:
            os.close(descriptor)


def names_told(folder: Path) -> list[str]:
    """What `tell_names` said last; [] if nothing, or if it is read while it is written."""
    try:
        data = (folder / CONTENTS).read_bytes()
        length, checksum = (int(field, 16) for field in data[:17].split())
    except (OSError, ValueError):  # it only brings forward what a listing will say
        return []
    text = data[18 : 18 + length]
    return text.decode().split("\n") if text and zlib.crc32(text) == checksum else []


def _cannot(what: str, where: Path, error: OSError) -> DataRootError:
    return DataRootError(
        f"cannot {what} {where}: {error.strerror}. Check space, quota, permissions and the mount of the data root.",
        path=str(where),
    )
