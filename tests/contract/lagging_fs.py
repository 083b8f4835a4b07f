"""One node's view of a shared folder, as an NFS client's cache gives it: late; and faults that can be switched on.

    FUSE_LIBRARY_NAME=fuse3 python tests/contract/lagging_fs.py FOLDER MOUNTPOINT --lag-s 30 --faults FILE

A process of its own (nodes.py starts one for each "node"). What is written goes to FOLDER at once; what is *seen* is
as old as `lag_s` allows:

- the attributes of a path, and that a name does not exist (a negative dentry), are believed for `lag_s` seconds;
- so is the listing of a folder, whatever other nodes put there meanwhile;
- opening an existing file asks the server: it shows what was written before others closed it (close-to-open);
- a change of this node's own in a folder makes it forget what it believes of that folder: the server's answer carries
  the folder's new attributes, which no longer fit what is cached.

That is what nfs(5) describes ("DATA AND METADATA COHERENCE"; acregmax, acdirmax: 60 s; lookupcache=all). No locks:
flock and fcntl fail with ENOLCK, as where no lock daemon runs.

The faults file is read again whenever it changes: JSON, a list of {"error": "ENOSPC", "operations": [...], "paths":
[fnmatch patterns of the path below the mount point]}; "operations" and "paths" may be left out. ENOSPC and EDQUOT meet
what needs room, EROFS what changes anything, EIO what is named (or everything but looking).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fnmatch
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mfusepy

NEEDS_ROOM = frozenset({"create", "write", "mkdir", "link", "symlink"})
CHANGES = NEEDS_ROOM | {"unlink", "rmdir", "rename", "chmod", "truncate", "utimens", "open_to_write"}
DOES_IO = CHANGES | {"read", "fsync", "open"}
MEETS = {"ENOSPC": NEEDS_ROOM, "EDQUOT": NEEDS_ROOM, "EROFS": CHANGES, "EIO": DOES_IO}
ATTRIBUTES = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
TIMES = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")
Entry = tuple[str, dict[str, int], int]
"""Name, inode number, and 0, as mfusepy wants them."""


class Faults:
    """What fails now, as the control file says."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read_at: tuple[int, int] | None = None
        self._rules: list[dict[str, Any]] = []

    def meet(self, operation: str, path: str) -> None:
        """Raises: OSError if this operation on this path is to fail."""
        try:
            info = self._file.stat()
        except FileNotFoundError:
            return
        if self._read_at != (info.st_mtime_ns, info.st_ino):
            self._rules = json.loads(self._file.read_text())
            self._read_at = (info.st_mtime_ns, info.st_ino)
        for rule in self._rules:
            met = operation in rule.get("operations", MEETS[rule["error"]])
            if met and any(fnmatch.fnmatch(path.lstrip("/"), pattern) for pattern in rule.get("paths", ["*"])):
                raise mfusepy.FuseOSError(getattr(errno, rule["error"]))


class Cache:
    """What this node believes, each thing for `lag_s` seconds from when it was looked up."""

    def __init__(self, lag_s: float) -> None:
        self._lag_s = lag_s
        self._lock = threading.Lock()
        self._attributes: dict[str, tuple[float, dict[str, Any] | None]] = {}  # None: does not exist
        self._listings: dict[str, tuple[float, list[Entry]]] = {}

    def attributes(self, path: str) -> tuple[bool, dict[str, Any] | None]:
        """(whether anything is believed, what)."""
        with self._lock:
            until, found = self._attributes.get(path, (0.0, None))
            return time.monotonic() < until, found

    def listing(self, path: str) -> list[Entry] | None:
        with self._lock:
            until, entries = self._listings.get(path, (0.0, []))
            return entries if time.monotonic() < until else None

    def saw(self, path: str, found: dict[str, Any] | None) -> None:
        with self._lock:
            self._attributes[path] = (time.monotonic() + self._lag_s, found)

    def listed(self, path: str, entries: list[Entry]) -> None:
        with self._lock:
            self._listings[path] = (time.monotonic() + self._lag_s, entries)

    def changed(self, *paths: str) -> None:
        """This node has changed these itself."""
        with self._lock:
            for path in paths:
                folder = os.path.dirname(path)
                self._listings.pop(folder, None)
                self._listings.pop(path, None)
                self._attributes.pop(path, None)
                self._attributes.pop(folder, None)
                missing = [p for p, (_, found) in self._attributes.items() if found is None]
                for known in missing:
                    if os.path.dirname(known) == folder or known.startswith(f"{path}/"):
                        del self._attributes[known]


class LaggingFolder(mfusepy.Operations):
    """Passes everything to a folder, through what is believed of it."""

    use_ns = True

    def __init__(self, folder: str, lag_s: float, faults: Faults) -> None:
        self._folder = folder
        self._cache = Cache(lag_s)
        self._faults = faults

    def _real(self, path: str) -> str:
        return self._folder + path

    @contextlib.contextmanager
    def _changing(self, operation: str, path: str, *more: str) -> Iterator[None]:
        self._faults.meet(operation, path)
        try:
            yield
        finally:
            self._cache.changed(path, *more)

    # ---- looking

    def getattr(self, path: str, file: Any = None) -> dict[str, Any]:
        if file is not None:
            return _described(os.fstat(file.fh))
        believed, found = self._cache.attributes(path)
        if not believed:
            try:
                found = _described(os.lstat(self._real(path)))
            except FileNotFoundError:
                found = None
            self._cache.saw(path, found)
        if found is None:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return found

    def readdir(self, path: str, fh: int) -> list[Entry]:
        entries = self._cache.listing(path)
        if entries is None:
            self._faults.meet("readdir", path)
            with os.scandir(self._real(path)) as found:
                # An entry with inode number 0 counts as deleted (readdir(3)).
                entries = [(entry.name, {"st_ino": entry.inode()}, 0) for entry in found]
            self._cache.listed(path, entries)
        return [(".", {"st_ino": 1}, 0), ("..", {"st_ino": 1}, 0), *entries]

    def open(self, path: str, file: Any) -> int:
        self._faults.meet("open", path)
        if file.flags & os.O_ACCMODE != os.O_RDONLY:
            self._faults.meet("open_to_write", path)
        try:
            # The kernel has sought the place to append at: the server is told where.
            file.fh = os.open(self._real(path), file.flags & ~os.O_APPEND)
        except FileNotFoundError:
            self._cache.saw(path, None)
            raise
        self._cache.saw(path, _described(os.fstat(file.fh)))
        return 0

    def read(self, path: str, size: int, offset: int, file: Any) -> bytes:
        self._faults.meet("read", path)
        return os.pread(file.fh, size, offset)

    def readlink(self, path: str) -> str:
        return os.readlink(self._real(path))

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._real(path))
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail")
        return {name: getattr(found, name) for name in names}

    # ---- changing

    def create(self, path: str, mode: int, file: Any = None) -> int:
        with self._changing("create", path):  # the server says whether O_EXCL is met, whatever is believed here
            file.fh = os.open(self._real(path), file.flags & ~os.O_APPEND | os.O_CREAT, mode)
        return 0

    def write(self, path: str, data: bytes, offset: int, file: Any) -> int:
        with self._changing("write", path):
            return os.pwrite(file.fh, data, offset)

    def truncate(self, path: str, length: int, file: Any = None) -> None:
        with self._changing("truncate", path):
            os.truncate(self._real(path), length)

    def fsync(self, path: str, datasync: int, file: Any) -> None:
        self._faults.meet("fsync", path)
        os.fsync(file.fh)

    def fsyncdir(self, path: str, datasync: int, file: Any) -> None:
        self._faults.meet("fsync", path)

    def release(self, path: str, file: Any) -> None:
        os.close(file.fh)

    def mkdir(self, path: str, mode: int) -> None:
        with self._changing("mkdir", path):
            os.mkdir(self._real(path), mode)

    def rmdir(self, path: str) -> None:
        with self._changing("rmdir", path):
            os.rmdir(self._real(path))

    def unlink(self, path: str) -> None:
        with self._changing("unlink", path):
            os.unlink(self._real(path))

    def link(self, target: str, source: str) -> None:
        with self._changing("link", target, source):
            os.link(self._real(source), self._real(target))

    def symlink(self, target: str, source: str) -> None:
        with self._changing("symlink", target):
            os.symlink(source, self._real(target))

    def rename(self, old: str, new: str) -> None:
        with self._changing("rename", old, new):
            self._faults.meet("rename", new)
            os.rename(self._real(old), self._real(new))

    def chmod(self, path: str, mode: int) -> None:
        with self._changing("chmod", path):
            os.chmod(self._real(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        with self._changing("chmod", path):
            os.chown(self._real(path), uid, gid)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        with self._changing("utimens", path):
            os.utime(self._real(path), ns=times)

    # ---- not there

    def flock(self, path: str, file: Any, op: int) -> int:
        raise mfusepy.FuseOSError(errno.ENOLCK)

    def lock(self, path: str, file: Any, cmd: int, lock: Any) -> int:
        raise mfusepy.FuseOSError(errno.ENOLCK)


def _described(info: os.stat_result) -> dict[str, Any]:
    found = {name: getattr(info, name) for name in ATTRIBUTES}
    return found | {name.removesuffix("_ns"): getattr(info, name) for name in TIMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--lag-s", type=float, default=30.0)
    parser.add_argument("--faults", type=Path, required=True)
    options = parser.parse_args()
    assert stat.S_ISDIR(options.folder.stat().st_mode)
    operations = LaggingFolder(str(options.folder.resolve()), options.lag_s, Faults(options.faults))
    # The kernel believes nothing by itself: what is cached, and for how long, is decided above.
    mfusepy.FUSE(
        operations, str(options.mountpoint), foreground=True, raw_fi=True, use_ino=True,
        attr_timeout=0, entry_timeout=0, negative_timeout=0,
    )  # fmt: skip


if __name__ == "__main__":
    main()
