"""Publishing a checkpoint: the group of the data root may read it, and nothing else of yours.

    <data root>, checkpoints/, <model>/, <kind>/    0710   the group may pass, not list
    <name>/                                         0750
    <name>/*                                        0640

Everything else under the data root keeps 0700 and 0600: runs with their keys, data and logs, every other checkpoint.
The folder's own mode is the record of it, so there is nothing that could disagree after a restart. The group is that of
the data root (`chgrp lab <data root>` chooses it). Unpublishing takes all of it back, closing the folders above once no
published checkpoint is left below them. Somebody else uses one by its files: peft loads the folder as it is, and copied
to the same place under their own data root its tinker:// path works for them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway.checkpoints import METADATA, Checkpoint

PASS, FOLDER, FILE = 0o710, 0o750, 0o640
CLOSED_FOLDER, CLOSED_FILE = 0o700, 0o600


def publish(checkpoint: Checkpoint, root: Path) -> None:
    """Let the data root's group read it.

    Raises: RequestError if the way to the data root lets nobody through; OSError if modes cannot be changed.
    """
    group = root.stat().st_gid
    for above in root.parents:
        if not above.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH):
            raise RequestError(
                f"cannot publish {checkpoint.path}: {above} lets nobody but its owner through, so your group cannot "
                f"reach {root}. Put data_root where they can (a project folder), or: chmod g+x {above}"
            )
    for other in root.iterdir():  # nothing made by hand or by an older version may come along
        if other.name != "checkpoints" and not other.is_symlink() and other.stat().st_uid == os.getuid():
            os.chmod(other, other.stat().st_mode & CLOSED_FOLDER)
    for file in _files(checkpoint):
        os.chown(file, -1, group)
        os.chmod(file, FILE)
    os.chown(checkpoint.folder, -1, group)
    for folder in _above(checkpoint, root):
        os.chown(folder, -1, group)
        os.chmod(folder, PASS)
    os.chmod(checkpoint.folder, FOLDER)


def unpublish(checkpoint: Checkpoint, root: Path) -> None:
    """Take it back. Raises: OSError."""
    os.chmod(checkpoint.folder, CLOSED_FOLDER)
    for file in _files(checkpoint):
        os.chmod(file, CLOSED_FILE)
    close_above(checkpoint, root)


def close_above(checkpoint: Checkpoint, root: Path) -> None:
    """Close the folders above it that have nothing published below them any more."""
    for folder in _above(checkpoint, root):
        if any(below.is_dir() and below.stat().st_mode & stat.S_IXGRP for below in folder.iterdir()):
            return
        os.chmod(folder, CLOSED_FOLDER)


def _files(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.folder / name for name in (METADATA, *checkpoint.metadata.get("files", {}))]


def _above(checkpoint: Checkpoint, root: Path) -> list[Path]:
    """The folders from just above the checkpoint up to the data root."""
    kind = checkpoint.folder.parent
    return [kind, kind.parent, kind.parent.parent, root]
