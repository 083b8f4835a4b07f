"""How long checkpoints are kept.

The rule, in full:
1. A checkpoint whose time is over (`ttl_seconds` after it was saved, or after its TTL was last set), or that was
   deleted, is refused and unlisted from that second on.
2. A gateway removes its files at its start and every ten minutes, no sooner than a minute after 1, and never while a
   run that is still going has read from it: a worker that starts again reads it again (worker/redo.py). Deleting one
   that no run needs removes it at once.
3. Removing is a rename first, and what was renamed is looked at again: one saved over it in that moment is put back.

Which checkpoints a run has read is in its reads.json, written before the request that reads is accepted. A run is over
when its outcome is there or all its workers have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
from pathlib import Path

from tinker_hpc.errors import DataRootError, RequestError
from tinker_hpc.gateway import checkpoints
from tinker_hpc.gateway.checkpoints import Checkpoint
from tinker_hpc.gateway.refusals import try_again
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder

SWEEP_EVERY_S = 600.0
GRACE_S = 60.0

log = logging.getLogger(__name__)


class Reads:
    """The checkpoints this run has read, in reads.json."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._known: set[str] = set(read_json(path) or ())

    async def note(self, checkpoint: Checkpoint) -> None:
        """Durably say that this run reads it. Raises: Refusal 503 if the disk refuses."""
        path = str(checkpoint.path)
        async with self._lock:
            if path in self._known:
                return
            try:
                await asyncio.to_thread(write_json, self._path, sorted(self._known | {path}))
            except DataRootError as error:
                raise try_again(f"nothing was accepted: {error} The SDK tries again for 5 minutes.") from error
            self._known.add(path)


def still_read(root: Path) -> set[str]:
    """Paths of the checkpoints that runs which are still going have read."""
    found: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(root / "runs"):
            run = RunFolder(root / "runs" / name)
            try:
                reads = read_json(run.reads)
                if reads and not _is_over(run):
                    found.update(reads)
            except (OSError, ValueError, TypeError) as error:
                log.warning("cannot tell what run %s reads (%s)", name, error)
                raise
    return found


def _is_over(run: RunFolder) -> bool:
    if run.outcome.exists():
        return True
    phases = [(read_json(worker.status) or {}).get("phase") for worker in run.workers()]
    return bool(phases) and all(phase == "ended" for phase in phases)


def remove(checkpoint: Checkpoint) -> bool:
    """Remove its files. False if another checkpoint was saved there meanwhile, or it is gone already."""
    folder = checkpoint.folder
    removed = folder.parent / f".{folder.name}.removed-{secrets.token_hex(4)}"
    try:
        os.rename(folder, removed)
    except FileNotFoundError:
        return False
    if _created_at(checkpoint, removed) != checkpoint.created_at and not folder.exists():
        os.rename(removed, folder)
        return False
    shutil.rmtree(removed, ignore_errors=True)
    checkpoints.retention_file(folder).unlink(missing_ok=True)
    return True


def _created_at(checkpoint: Checkpoint, folder: Path) -> float | None:
    try:
        return checkpoints.read(checkpoint.path, folder).created_at
    except RequestError:
        return checkpoint.created_at  # damaged or half removed: nothing to put back


def sweep(root: Path, now: float) -> list[str]:
    """Remove what rule 2 allows; the paths removed."""
    for half_removed in root.glob("checkpoints/*/*/.*.removed-????????"):
        shutil.rmtree(half_removed, ignore_errors=True)  # by a gateway that was killed meanwhile
    over = [c for c in checkpoints.all_of(root, gone=True) if c.why_gone(now - GRACE_S) is not None]
    if not over:
        return []
    needed = still_read(root)
    return [str(c.path) for c in over if str(c.path) not in needed and remove(c)]


async def keep_sweeping(root: Path) -> None:
    """Sweep for as long as the gateway runs."""
    while True:
        try:
            for path in await asyncio.to_thread(sweep, root, time.time()):
                log.warning("removed %s: its time was over", path)
        except (OSError, ValueError, TypeError) as error:
            log.warning("expired checkpoints stay for now: %s", error)
        await asyncio.sleep(SWEEP_EVERY_S)
