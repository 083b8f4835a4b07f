"""Step 1 of a request. Before: tinker_hpc/submission.py wrote payload.pkl. After: the stock SDK, then gateway/app.py.

`python -m tinker_hpc.loop --run-dir DIR` runs the user's function on the job's first node, in a process of its own.
The supervisor has set TINKER_BASE_URL and TINKER_API_KEY, so plain `tinker.ServiceClient()` finds the gateway.
Its outcome goes to result.pkl, whole or not at all, and waits for a disk that is full for a while; the exit code is 0
after a return and 1 after an exception.

A run's loop may be started several times: after its node died it begins at the beginning and is given the recorded
answers (gateway/replay.py). So every start of one run draws the same random numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc.patience import until_written, words_may_be_lost
from tinker_hpc.payload import dump_error, dump_success, load_call
from tinker_hpc.private_files import write_bytes
from tinker_hpc.run_folder import RunFolder, seed_of_run


def seed_everything(run_id: str) -> None:
    """Seed `random` and numpy's global generator from the run's id; torch's own default seed is a constant.

    The seed of hashing (PYTHONHASHSEED) has to be there before Python starts: launch/children.py sets it. What is
    imported with the payload may have drawn already, from launch/loop_start/sitecustomize.py's.
    """
    seed = seed_of_run(run_id, os.environ)
    random.seed(seed)
    np.random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


async def _await(awaitable: Any) -> Any:
    return await awaitable


def run_loop(folder: RunFolder) -> int:
    """Run the function of `payload.pkl` and write `result.pkl`.

    Returns: the exit code, 0 after a return, 1 after an exception or a return value that does not pickle.
    """
    try:
        call = load_call(folder.payload.read_bytes())
        seed_everything(folder.run_id)  # after the payload's imports, which may draw
        value = call.result()
        if inspect.isawaitable(value):
            value = asyncio.run(_await(value))
        data, code = dump_success(value), 0
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the client waits for an answer
        if isinstance(error, SystemExit) and error.code in (None, 0):
            data, code = dump_success(None), 0
        else:
            traceback.print_exc()
            data, code = dump_error(error), 1
    until_written(lambda: write_bytes(folder.result, data))
    return code


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m tinker_hpc.loop", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's folder on the shared filesystem")
    run_folder = RunFolder(parser.parse_args().run_dir)
    words_may_be_lost()
    sys.exit(run_loop(run_folder))


if __name__ == "__main__":
    main()
