"""What several ranks do with each other, for gloo_launcher: functions run on every rank, results from rank 0."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record
from tinker_hpc.worker import ranks as ranks_module
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks


def talk(folder: Path) -> dict[str, Any]:
    """Every rank writes what it saw into `folder`; rank 0 returns it all."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(dist.group.WORLD, rank, world_size)
    seen: dict[str, Any] = {}

    sent = [Record({"command": "x", "loss": float("inf")}, {"a": np.arange(5, dtype=np.int32)}), Record({})]
    got = ranks.broadcast(sent if rank == 0 else None)
    seen["records"] = [(r.header, {k: v.tolist() for k, v in r.arrays.items()}) for r in got]
    seen["nothing"] = ranks.broadcast([] if rank == 0 else None)
    seen["all well"] = ranks.agree(None)
    seen["all failed"] = ranks.agree(Failure("user", f"rank {rank} says no"))
    seen["result"] = ranks.on_first(lambda: {"rank": rank})
    seen["errors"] = []
    for error in (RequestError("bad"), OSError(28, "No space left on device"), KeyError("x")):
        try:
            ranks.on_first(lambda error=error: throw(error))
        except Exception as raised:
            seen["errors"].append((type(raised).__name__, str(raised)))
    try:
        ranks.agree(Failure("server", "only here") if rank == 1 else None)
    except EndWorker as apart:
        seen["apart"] = (str(apart), apart.failure)
    dist.barrier()
    ranks_module.AGREE_TIMEOUT = timedelta(seconds=1)
    if rank == 1:
        try:
            ranks.agree(Failure("server", "the others hang"))
        except EndWorker as apart:
            seen["alone"] = (str(apart), apart.failure)
    else:
        time.sleep(3)  # in a collective that rank 1 has left, say
    ranks_module.AGREE_TIMEOUT = timedelta(seconds=60)
    if rank == 1:  # killed
        (folder / "1.txt").write_text(repr(seen))
        os._exit(0)
    try:
        ranks.agree(Failure("server", "Connection reset by peer"))
    except EndWorker as apart:
        seen["widowed"] = (str(apart), apart.failure)
    (folder / f"{rank}.txt").write_text(repr(seen))
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.txt"))) < world_size and time.monotonic() < deadline:
        time.sleep(0.05)
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def end_in_the_middle() -> int:
    """Rank 0 returns while the other still comes to what both began."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    works = []
    for _ in range(200):
        flags = [torch.zeros(1) for _ in range(2)]
        if dist.get_rank() == 0:
            works.append(dist.all_gather(flags, torch.ones(1), async_op=True))
        else:
            time.sleep(0.002)
            try:
                dist.all_gather(flags, torch.ones(1))
            except RuntimeError:  # rank 0 is gone
                break
    return len(works)


def throw(error: Exception) -> None:
    raise error
