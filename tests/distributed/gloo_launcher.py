"""Start a few ranks on this machine, run one function on each, bring back what rank 0 returned.

The parent holds the store, as torch's elastic agent does, so no port is guessed and two launches never collide.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tinker_hpc.worker.parting import end

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run_ranks(
    target: str, world_size: int, folder: Path, *arguments: Any, timeout_s: float = 280.0, modules: Path = HERE
) -> Any:
    """Run `target` ("module:function", module in the folder `modules`) on every rank as function(*arguments).

    Returns: what rank 0's call returned (pickled).
    Raises: AssertionError with every rank's output if one fails or the time is over; the other ranks are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.pkl").write_bytes(pickle.dumps(arguments))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    environment = os.environ | {
        "GLOO_LAUNCHER_TIMEOUT_S": str(timeout_s),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, HERE.parent, modules))),
    }
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, target, str(folder)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        _wait(processes, logs, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return pickle.loads((folder / "result.pkl").read_bytes())


def _wait(processes: list[subprocess.Popen[bytes]], logs: list[Path], deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.poll()]
        if failed or time.monotonic() > deadline:
            time.sleep(1.0)  # let the others write their own traceback
            break
        time.sleep(0.02)
    if any(process.poll() != 0 for process in processes):
        texts = [f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs]
        raise AssertionError(f"exit codes {[process.poll() for process in processes]}\n" + "\n".join(texts))


def _main(target: str, folder: Path) -> None:
    # Where everybody waits, in the log, just before the parent gives up; and no rank outlives a killed parent.
    faulthandler.dump_traceback_later(float(os.environ["GLOO_LAUNCHER_TIMEOUT_S"]) * 0.7)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    module, function = target.split(":")
    call = getattr(__import__(module), function)
    result = call(*pickle.loads((folder / "arguments.pkl").read_bytes()))
    if os.environ["RANK"] == "0":
        (folder / "result.pkl").write_bytes(pickle.dumps(result))
    end(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
