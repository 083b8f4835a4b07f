"""Files and folders that are their owner's alone, and are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from tinker_hpc.errors import DataRootError

PRIVATE_DIR = 0o700
PRIVATE_FILE = 0o600


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON: all of it or nothing, durable on return, mode 0600."""
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True).encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: all of it or nothing, durable on return, mode 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataRootError(
            f"cannot write {path}: {error.strerror}. Free some space or check the permissions, then try again.",
            path=str(path),
        ) from error


def read_json(path: Path) -> Any | None:
    """The JSON in `path`, or None while it does not exist."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(folder: Path) -> Path:
    """Create `folder`, and its parents where they are missing, with mode 0700 and return it."""
    try:
        for missing in [path for path in reversed(folder.parents) if not path.exists()]:
            missing.mkdir(mode=PRIVATE_DIR, exist_ok=True)
        folder.mkdir(mode=PRIVATE_DIR, exist_ok=True)
        os.chmod(folder, PRIVATE_DIR)
    except OSError as error:
        raise DataRootError(
            f"cannot create {folder}: {error.strerror}. Choose a folder you may write to: "
            "set data_root in the configuration file or TINKER_HPC_DATA_ROOT.",
            path=str(folder),
        ) from error
    return folder


def check_data_root(root: Path) -> Path:
    """Create the data root if need be and refuse one that is not ours alone.

    Raises: DataRootError if it cannot be created or written, belongs to somebody else, or lets others in.
    """
    make_private(root) if not root.exists() else None
    info = root.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise DataRootError(f"data root {root} is not a folder. Set TINKER_HPC_DATA_ROOT to one.", path=str(root))
    if info.st_uid != os.getuid():
        raise DataRootError(
            f"data root {root} belongs to uid {info.st_uid}, not to you (uid {os.getuid()}). "
            "Set TINKER_HPC_DATA_ROOT to a folder of your own.",
            path=str(root),
        )
    if info.st_mode & 0o067:  # the group may pass through (published checkpoints), not look around
        raise DataRootError(
            f"data root {root} has mode {stat.S_IMODE(info.st_mode):04o}: others on this cluster could read your "
            f"data and key. Run: chmod 700 {root}",
            path=str(root),
        )
    if not os.access(root, os.W_OK | os.X_OK):
        raise DataRootError(f"data root {root} is not writable. Run: chmod 700 {root}", path=str(root))
    return root


def check_private(path: Path) -> None:
    """Refuse a file or folder that is not ours alone: others could read it, or have written what is in it.

    Raises: DataRootError. A path that does not exist is private.
    """
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if info.st_uid != os.getuid():
        raise DataRootError(
            f"{path} belongs to uid {info.st_uid}, not to you (uid {os.getuid()}): somebody else has put it there. "
            "Nothing of this run is used; submit it again under a data root of your own.",
            path=str(path),
        )
    if not stat.S_ISLNK(info.st_mode) and info.st_mode & 0o077:
        raise DataRootError(
            f"{path} has mode {stat.S_IMODE(info.st_mode):04o}: others on this cluster could read or change it. "
            f"Run: chmod go= {path}",
            path=str(path),
        )
