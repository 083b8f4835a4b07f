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

from megatron_adapters.engine import Datum, Engine, Layout, LoraSpec
from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record
from tinker_hpc.worker import ranks as ranks_module
from tinker_hpc.worker.ranks import EndWorker, Failure, Ranks, describe


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
    no_room = Failure("server", "no room", out_of_memory=True)
    seen["all out of memory"] = ranks.agree(no_room)
    try:
        Ranks(dist.group.WORLD, rank, world_size, in_place=False).agree(no_room)
    except EndWorker as apart:
        seen["not in place"] = (str(apart), apart.failure)
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


def run_out_alone(model_folder: Path, layout: Layout, backward: bool, folder: Path) -> dict[int, tuple[str, Any]]:
    """Rank 1 alone runs out of memory in the second micro-batch of a pass.

    Returns: what each rank ends with, and whether it knows of a request that did not fit.
    """
    ranks_module.AGREE_TIMEOUT = timedelta(seconds=3)
    engine = Engine.start(model_folder, layout, token_budget=16)
    rank = engine.global_rank
    ranks = Ranks(engine.control_group, rank, engine.world_size)
    engine.create_adapter("a", LoraSpec(4, seed=1))
    data = [Datum(np.arange(16, dtype=np.int32), {"target_tokens": np.arange(16)}) for _ in range(4)]
    stage, calls = engine.model.stage, []

    def one_that_runs_out(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if rank == 1 and len(calls) == 2:
            raise MemoryError("no room")
        return stage(*arguments, **options)

    engine.model.stage = one_that_runs_out
    failure = None
    try:
        engine.run_pass("a", data, lambda logprobs, inputs, segment_ids: -logprobs.sum(), backward=backward)
    except Exception as error:
        failure = describe(error)
    said = "goes on"
    try:
        ranks.agree(failure)
    except EndWorker as apart:
        said, failure = str(apart), apart.failure
    (folder / f"{rank}.txt").write_text(repr((said, failure and failure.out_of_memory)))
    others = [folder / f"{other}.txt" for other in range(rank + 1, engine.world_size)]
    while not all(path.exists() for path in others):  # one that ends takes the others out of their collectives
        time.sleep(0.05)
    return {int(path.stem): eval(path.read_text()) for path in folder.glob("*.txt")}


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
