"""The ranks: who am I, which device, which process groups. Everything that reads torchrun's environment is here."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from tinker_hpc.errors import ConfigError

from . import cpu_shims
from .interface import Layout
from .placement import Place, place_of

TIMEOUT = timedelta(days=30)
"""Of every group. An idle worker's ranks wait on rank 0's next broadcast for as long as nobody sends a request, and a
stage or a copy waits for another's long batch. Who hangs is found out by progress (tinker_hpc/worker/hang.py)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """This rank's place (placement.py has the numbering) and the groups it talks over."""

    layout: Layout
    device: torch.device
    dtype: torch.dtype
    global_rank: int
    place: Place
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    """the ranks of a stage that together hold all its experts"""
    expert_copies_group: dist.ProcessGroup
    """the ranks of a stage that hold the same experts as this one"""
    forward_group: dist.ProcessGroup
    """the stages of this rank's column of the pipeline: activations, sent onwards only"""
    backward_group: dist.ProcessGroup
    """the same ranks: gradients, sent backwards only; of its own, since NCCL runs a group's messages in order"""
    control_group: dist.ProcessGroup
    """gloo over all ranks: small CPU tensors and Python objects, and adapters on their way to a file"""

    @property
    def tp_rank(self) -> int:
        return self.place.tp_rank

    @property
    def dp_rank(self) -> int:
        return self.place.dp_rank

    @property
    def is_first_stage(self) -> bool:
        return self.place.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place.pp_rank == self.layout.pp_size - 1


def start(layout: Layout, dtype: str | None = None) -> Runtime:
    """Join the process group and make the tensor- and data-parallel groups.

    Args:
        dtype: "float32" or "bfloat16"; None means bfloat16 on CUDA and float32 on CPU.
    Raises: ConfigError if the number of processes does not fit the layout, the dtype is unknown, or torch does not see
        the GPUs that the job was given.
    Collectives: creates groups, and on CUDA those of connect, so every rank must call it at the same point; a second
        call leaves the groups of the first.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != layout.world_size:
        raise ConfigError(
            f"{world_size} processes were started, but tp_size {layout.tp_size} * dp_size {layout.dp_size} * pp_size "
            f"{layout.pp_size} needs {layout.world_size}. Change the layout or the number of ranks."
        )
    cuda = torch.cuda.is_available()
    if not cuda:
        _refuse_given_gpus(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    compute_dtype = _dtype(dtype, cuda)
    if cuda:
        torch.cuda.set_device(device)  # before NCCL, which binds to the current device
        initialize_rng_tracker(inference_rng_tracker=True)
        # Masked attention goes to cuDNN first on Hopper and later, which builds and keeps an execution plan for every
        # new shape, up to half a second each (measured: github.com/modelscope/FunASR/issues/3704). Lanes and length
        # change all the time while decoding, and gpt-oss trains with masks. CUTLASS' memory-efficient kernel, which
        # comes next, takes any shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # float32 is float32: containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which this wins over.
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        cpu_shims.install()
    if not dist.is_initialized():
        _join(world_size, cuda)
    _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        expert_model_parallel_size=layout.ep_size,
        expert_tensor_parallel_size=1,  # its default is the TP size, which gloo's collectives cannot serve
        create_gloo_process_groups=False,
        distributed_timeout_minutes=TIMEOUT // timedelta(minutes=1),
    )
    control_group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
    mpu: Any = parallel_state  # its annotations admit None, which initialize_model_parallel rules out
    forward_group: Any = mpu.get_pipeline_model_parallel_group()
    ranks = Runtime(
        layout=layout,
        device=device,
        dtype=compute_dtype,
        global_rank=dist.get_rank(),
        place=place_of(dist.get_rank(), layout),
        tp_group=mpu.get_tensor_model_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        ep_group=mpu.get_expert_model_parallel_group(),
        expert_copies_group=mpu.get_expert_data_parallel_group(),
        forward_group=forward_group,
        backward_group=_second_pipeline_group(layout) if layout.pp_size > 1 else forward_group,
        control_group=control_group,
    )
    if cuda:
        connect(ranks)
    return ranks


def connect(ranks: Runtime) -> None:
    """Use every way there is between ranks once. NCCL makes a communicator, and the buffers of a connection, when they
    are first needed, outside torch's allocator: later, activations may have left them no memory.

    Collectives: one all-reduce over each group and an all-to-all over ep_group, in one order on all ranks; a message
        [1] from stage to stage, and one back, so that no two wait for each other.
    """
    number = torch.zeros(1, device=ranks.device)
    groups = [ranks.tp_group, ranks.dp_group, ranks.forward_group]
    if ranks.layout.ep_size > 1:  # else there may be no experts at all, and a communicator costs memory
        groups += [ranks.ep_group, ranks.expert_copies_group]
        one_each = torch.zeros(ranks.layout.ep_size, device=ranks.device)
        dist.all_to_all_single(torch.empty_like(one_each), one_each, group=ranks.ep_group)
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(number, group=group)
    stage = ranks.place.pp_rank
    if not ranks.is_first_stage:
        dist.recv(number, group=ranks.forward_group, group_src=stage - 1)
    if not ranks.is_last_stage:
        dist.send(number, group=ranks.forward_group, group_dst=stage + 1)
        dist.recv(number, group=ranks.backward_group, group_src=stage + 1)
    if not ranks.is_first_stage:
        dist.send(number, group=ranks.backward_group, group_dst=stage - 1)


def _leave_groups() -> None:
    """Leave the groups of a layout before this one: each gloo group is a thread that polls at 100 Hz.

    Collectives: a barrier over all ranks, so that nobody leaves in the middle of another's last exchange.
    """
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):  # pyright: ignore[reportPrivateUsage]: torch lists them nowhere else
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def stop() -> None:
    """Leave all groups. Collectives: every rank should leave, or the others' next collective fails."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(runtime: Runtime, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 alone; if it raises, every rank raises the same error instead of waiting for ever.

    Collectives: those of first_failure, which are also the barrier: the work is done on return.
    """
    failure: Exception | None = None
    if runtime.global_rank == 0:
        try:
            action()
        except Exception as error:
            failure = error
    shared = first_failure(runtime, failure)
    if shared is not None:
        raise shared


def first_failure(runtime: Runtime, failure: Exception | None) -> Exception | None:
    """The failure of the lowest rank that had one, the same on all ranks; None if nobody had one.

    Collectives: one all-reduce of a number over control_group, and an object broadcast if anybody failed.
    """
    none = runtime.layout.world_size
    lowest = torch.tensor(none if failure is None else runtime.global_rank)
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=runtime.control_group)
    source = int(lowest)
    if source == none:
        return None
    return _broadcast_failure(runtime, failure, source)


def first_failures(runtime: Runtime, failures: Mapping[int, Exception], count: int) -> dict[int, Exception]:
    """As first_failure, for `count` things that may fail each by itself: number -> failure, the same on all ranks.

    Collectives: one all-reduce of `count` numbers over control_group, and an object broadcast for each that failed.
    """
    none = runtime.layout.world_size
    lowest = torch.tensor([runtime.global_rank if index in failures else none for index in range(count)])
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=runtime.control_group)
    shared = {}
    for index, source in enumerate(lowest.tolist()):
        if source != none:
            shared[index] = _broadcast_failure(runtime, failures.get(index), source)
    return shared


def _broadcast_failure(runtime: Runtime, failure: Exception | None, source: int) -> Exception:
    shared: list[Exception | None] = [None]
    if source == runtime.global_rank and failure is not None:
        shared = [failure if _pickles(failure) else RuntimeError(f"{type(failure).__name__}: {failure}")]
    dist.broadcast_object_list(shared, src=source, group=runtime.control_group)
    assert shared[0] is not None
    return shared[0]


def _pickles(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign exception's __reduce__ raises
        return False
    return True


def _refuse_given_gpus(visible: str) -> None:
    """A job that was given GPUs must not compute for hours on CPUs, in another precision, because torch sees none.

    Args: visible: CUDA_VISIBLE_DEVICES, which launch/children.py leaves empty where the job has none.
    """
    if visible in ("", "-1", "NoDevFiles"):  # the last is what some versions of Slurm write
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    raise ConfigError(
        f"this job was given GPUs (CUDA_VISIBLE_DEVICES={visible}), but torch {torch.__version__}, {built}, "
        f"sees none on {os.uname().nodename}. If `nvidia-smi` fails there, the node is broken: leave it out. If the "
        "driver it prints is too old for that CUDA, or torch was built without, install the torch that fits the driver "
        "(docs/cluster.md, section 1). To compute on CPUs ask for gpus_per_node=0."
    )


def _join(world_size: int, cuda: bool) -> None:
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]


def _second_pipeline_group(layout: Layout) -> Any:
    """Groups of the ranks that differ in their stage alone; returns this rank's. Every rank makes all of them."""
    stage_size = layout.tp_size * layout.dp_size
    columns = [list(range(column, layout.world_size, stage_size)) for column in range(stage_size)]
    mine = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in columns]
    return mine[dist.get_rank() % stage_size]


def _dtype(name: str | None, cuda: bool) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if cuda else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown. Use one of: {', '.join(DTYPES)}.")
    return DTYPES[name]
