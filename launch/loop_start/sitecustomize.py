"""What Python runs first in a user's loop (https://docs.python.org/3/library/site.html): its draws become the run's.

A loop that is started again begins at its beginning, and is given the recorded answers as long as it asks the same. So
`random` and numpy's global generator start alike in every job of one run. torch's own default seed is a constant, and
hashing has PYTHONHASHSEED.

Only in the process that was started: what it starts draws as it would anywhere, or all workers of a pool would draw the
same. Imports nothing of ours: the loop's Python may belong to another environment. A sitecustomize that is hidden by
this one is run after it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import random
import sys
from types import ModuleType

SEED_VARIABLE = "TINKER_HPC_LOOP_SEED"


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


if (given := os.environ.pop(SEED_VARIABLE, None)) is not None:
    leave_the_path()
    random.seed(int(given))
    sys.meta_path.insert(0, SeedsNumpy(int(given)))  # type: ignore[arg-type]
    run_the_hidden_one()
