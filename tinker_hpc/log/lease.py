"""Which worker may write results, and which gateway requests: the one with the highest fencing number.

    lease/fence-<number>   JSON: who took it and when; made once, never changed or removed
    lease/newest           the highest number that was told (looking.py)

No flock (Lustre may lack it, NFS may keep it local): a name that can be made only once is enough. A worker that was
thought dead and comes back sees a higher number than its own and stops; readers ignore what it wrote meanwhile
(result_log.py). Whoever takes the lease tells its number before it does anything else.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinker_hpc.errors import LeaseLostError
from tinker_hpc.log.looking import list_names, newest_told, tell_newest
from tinker_hpc.log.segment import publish
from tinker_hpc.private_files import make_private

_NAME = re.compile(r"fence-(\d{8,})")


@dataclass(frozen=True)
class Lease:
    """The right to write results, until somebody else acquires it."""

    folder: Path
    fence: int
    owner: dict[str, Any] = field(default_factory=dict)
    holder: str = "worker"

    @classmethod
    def acquire(cls, folder: Path, owner: dict[str, Any], *, holder: str = "worker") -> Lease:
        """Take the lease from whoever has it. `owner` (host, pid, ...) and `holder` are for messages.

        Raises: DataRootError if the folder cannot be written.
        """
        make_private(folder)
        owner = {**owner, "acquired_at": time.time()}
        fence = 0
        while True:
            fence = max(fence, highest_fence(folder)) + 1
            try:
                publish(folder, _name(fence), [json.dumps(owner).encode()])
            except FileExistsError:  # another worker was faster, a moment ago or before this node looks again
                continue
            tell_newest(folder, fence)
            return cls(folder, fence, owner, holder)

    def check(self) -> None:
        """Raises: LeaseLostError if another worker has acquired the lease since; DataRootError if that is not to be
        found out now.
        """
        newest = highest_fence(self.folder)
        if newest != self.fence:
            raise LeaseLostError(
                f"{self.holder} lease {self.fence} of {self.folder.parent} was taken over: lease {newest} belongs to "
                f"{_owner_text(self.folder, newest)}. This {self.holder} stops writing "
                f"{'results' if self.holder == 'worker' else 'requests'} and ends; nothing to do.",
                fence=self.fence,
                newest=newest,
            )


def highest_fence(folder: Path) -> int:
    """The highest fencing number given out, 0 if none. Raises: DataRootError."""
    listed = max((int(m[1]) for m in map(_NAME.fullmatch, list_names(folder)) if m), default=0)
    return max(listed, newest_told(folder))


def _name(fence: int) -> str:
    return f"fence-{fence:08d}"


def _owner_text(folder: Path, fence: int) -> str:
    try:
        owner = json.loads((folder / _name(fence)).read_bytes())
        return f"pid {owner.get('pid', '?')} on {owner.get('host', '?')}"
    except (OSError, ValueError):
        return "an unknown process"
