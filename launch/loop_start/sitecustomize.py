"""What Python runs first in a user's loop (https://docs.python.org/3/library/site.html): its draws become the run's,
and it ends as it would have without the SDK's threads.

A loop that is started again begins at its beginning, and is given the recorded answers as long as it asks the same. So
`random` and numpy's global generator start alike in every job of one run. torch's own default seed is a constant, and
hashing has PYTHONHASHSEED.

Only in the process that was started: what it starts draws as it would anywhere, or all workers of a pool would draw the
same. Imports nothing of ours: the loop's Python may belong to another environment. A sitecustomize that is hidden by
this one is run after it.
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import os
import random
import sys
import time
from types import ModuleType

SEED_VARIABLE = "TINKER_HPC_LOOP_SEED"
_LAST_REPORTS_S = 0.2


class SeedsNumpy:
    """On sys.meta_path: seeds numpy's global generator when it is imported, if it ever is."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != "numpy.random":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_seed(module: ModuleType) -> None:
            execute(module)
            module.seed(self._seed)

        spec.loader.exec_module = execute_and_seed
        return spec


def end_the_sdks_requests() -> None:
    """Cancel what the tinker SDK still asks for, stop its event loop, and let its HTTP client's threads finish.

    One of these that has something to report while Python ends aborts the process, without a word: CPython before 3.14
    ends the thread where it asks for the interpreter (https://github.com/python/cpython/issues/87135). With SDK 0.38
    (pyqwest) on two loaded cores that was one in thirty programs that had done all they were to do: their runs failed.
    """
    module = sys.modules.get("tinker.lib.internal_client_holder")
    holder = getattr(module, "_internal_client_holder_thread_singleton", None)
    loop, thread = getattr(holder, "_loop", None), getattr(holder, "_thread", None)
    if loop is None or thread is None or not thread.is_alive():
        return
    import asyncio

    async def cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        for task in (await asyncio.wait(tasks, timeout=2.0))[0] if tasks else ():
            _ = task.cancelled() or task.exception()  # looked at, or asyncio complains of it

    try:
        asyncio.run_coroutine_threadsafe(cancel_all(), loop).result(5.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(2.0)
    except Exception:  # an SDK with other insides: it ends as it would have
        return
    time.sleep(_LAST_REPORTS_S)


def leave_the_path() -> None:
    """Take this folder out of what this process and its children import from."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != here]
    left = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder != here]
    if any(left):
        os.environ["PYTHONPATH"] = os.pathsep.join(left)
    else:
        os.environ.pop("PYTHONPATH", None)


def run_the_hidden_one() -> None:
    """The sitecustomize that Python would have found without this folder."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":  # not where it is imported for what it knows
    leave_the_path()
    atexit.register(end_the_sdks_requests)  # the first to be registered is the last to be called
    if (given := os.environ.pop(SEED_VARIABLE, None)) is not None:
        random.seed(int(given))
        sys.meta_path.insert(0, SeedsNumpy(int(given)))  # type: ignore[arg-type]
    run_the_hidden_one()
