"""Sampling snapshots that nobody used for a while, on the disk: brought back when a sample asks for one.

Rank 0 writes canonical full matrices in a thread of its own; any layout reads them. A snapshot never changes, so it is
written once, however often it comes and goes.
"""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_adapters.engine import Engine, HostCopy
from tinker_hpc.errors import RequestError
from tinker_hpc.patience import until_written
from tinker_hpc.private_files import make_private
from tinker_hpc.run_folder import model_folder_name
from tinker_hpc.worker.ranks import Ranks

MAX_WRITING = 2
"""Copies in host memory on their way to the disk; the next waits."""


class _Closed(Exception):
    """Ends a write that the disk refuses and nobody waits for any more."""


class SnapshotsAside:
    """The same calls in the same order on every rank."""

    def __init__(self, folder: Path, engine: Engine, ranks: Ranks) -> None:
        self._folder = folder
        self._engine = engine
        self._ranks = ranks
        self._writing: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._closing = threading.Event()
        self._written: set[str] = set()
        self._said = False

    def put(self, sampler: str) -> bool:
        """Take a snapshot out of the engine's memory. False if there is no memory for its copy: then it stays.

        Raises: EndWorker if that is so on some ranks alone.
        Collectives: Engine.copy_snapshot by Ranks.on_all, unless it was here before.
        """
        if sampler not in self._written:
            copies: list[HostCopy] = []
            failure = self._ranks.on_all(lambda: copies.append(self._engine.copy_snapshot(sampler)))
            if failure is not None:
                if not failure.out_of_memory:
                    raise RuntimeError(failure.message)
                self._say_once(failure.message)
                return False
            if self._ranks.is_first:
                while len(self._writing) >= MAX_WRITING:
                    self._settle(next(iter(self._writing)))
                write = functools.partial(self._write, sampler, copies.pop())
                self._writing[sampler] = self._thread.submit(until_written, write, sleep=self._pause)
            self._written.add(sampler)
        self._engine.drop_snapshot(sampler)
        return True

    def bring_back(self, sampler: str) -> None:
        """Into the engine again.

        Raises: RequestError if the disk does not have it: it refused for good then, or somebody removed it since;
            MemoryError if it does not fit; EndWorker if that is so on some ranks alone.
        Collectives: Ranks.on_first, Ranks.on_all.
        """
        self._ranks.on_first(lambda: self._settle(sampler))
        failure = self._ranks.on_all(lambda: self._engine.load_snapshot(sampler, self._of(sampler)))
        if failure is None:
            return
        if failure.out_of_memory:
            raise MemoryError(failure.message)
        raise RequestError(
            f"sampler {sampler} was set aside in {self._of(sampler)} and cannot be read back: {failure.message} "
            "Keep weights that you need for long with save_weights_for_sampler(name) and open them by path."
        )

    def forget(self, sampler: str) -> None:
        """Nobody can ask for it any more."""
        self._written.discard(sampler)
        if self._ranks.is_first:
            self._settle(sampler)
            shutil.rmtree(self._of(sampler), ignore_errors=True)

    def keep_only(self, samplers: Collection[str]) -> None:
        """On rank 0, before anything is put: the loop took requests back, and what it asks from there on may make
        other snapshots under the ids of those that do not count any more.
        """
        kept = {self._of(sampler).name for sampler in samplers}
        if self._folder.exists():
            for entry in self._folder.iterdir():
                if entry.name not in kept:
                    shutil.rmtree(entry, ignore_errors=True)

    def flush(self) -> None:
        """On rank 0: wait until everything is on the disk."""
        for sampler in list(self._writing):
            self._settle(sampler)

    def close(self) -> None:
        """End the thread, so that nothing is written into the folder from here on: whoever opens it next may make other
        snapshots under the same ids. What waits to be written is dropped; no snapshot of the worker refers to it
        (`TrainStep.state` flushes). A full disk is not waited for.
        """
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)

    def _say_once(self, why: str) -> None:
        """Over the bound is better than a request that fails for another's sake."""
        if self._ranks.is_first and not self._said:
            print(f"worker: sampling snapshots stay in memory beyond their bound: {why}", flush=True)
        self._said = True

    def _pause(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise _Closed

    def _settle(self, sampler: str) -> None:
        """Wait for its writing. A write that failed leaves no folder, and is told when somebody asks for it."""
        writing = self._writing.pop(sampler, None)
        if writing is not None and writing.exception() is not None:
            print(f"worker: sampler {sampler} could not be set aside: {writing.exception()}", flush=True)

    def _write(self, sampler: str, copy: HostCopy) -> None:
        final = self._of(sampler)
        if final.exists():
            return
        temporary = final.with_name(f".tmp-{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            copy.write(make_private(make_private(self._folder) / temporary.name))
            temporary.rename(final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _of(self, sampler: str) -> Path:
        return self._folder / model_folder_name(sampler)
