"""One adapter: its A and B matrices (this rank's shards), their gradients and their optimizer state.

All float32 state of an adapter lies in four flat buffers of one layout, replicated matrices first, then the sharded
ones. So summing gradients, clipping and stepping are a few operations on long vectors, whatever the number of layers.

`LoraWeights` is what a forward needs; `Adapter` is one that can be trained; a snapshot is a `LoraWeights` that is
frozen, in the compute dtype, and shares nothing with the adapter it was taken from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .projections import Projection


class LoraPair(NamedTuple):
    """This rank's part of one projection's matrices: a [rank, d_in (/ tp_size)], b [d_out (/ tp_size), rank]."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class LoraWeights:
    """What a forward adds to the base: pairs by Hugging Face module path. A path that is absent is not adapted."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    pairs: Mapping[str, LoraPair]
    _stacks: dict[tuple[str, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def stacked_a(self, paths: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        """The A of those of these projections that are adapted, under each other: [sum of ranks, d_in].

        Kept once made where it cannot change, that is for a snapshot.
        """
        if paths in self._stacks:
            return self._stacks[paths]
        matrices = [self.pairs[path].a for path in paths if path in self.pairs]
        stacked = (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).to(dtype)
        if not matrices[0].requires_grad:
            self._stacks[paths] = stacked
        return stacked

    def snapshot(self, dtype: torch.dtype) -> LoraWeights:
        """A frozen copy in the compute dtype: the numbers a forward of this adapter uses now."""
        copies = {
            path: LoraPair(*(part.detach().to(dtype, copy=True) for part in pair)) for path, pair in self.pairs.items()
        }
        return LoraWeights(self.rank, self.alpha, self.targets, copies)


@dataclass(frozen=True)
class Shard:
    """Place of one matrix in the flat buffers of one rank."""

    key: str
    """PEFT's name: base_model.model.<path>.lora_A.weight, or lora_B"""
    path: str
    full_shape: tuple[int, int]
    split_dim: int | None
    """dimension split over TP; None where every rank holds the whole matrix"""
    local_shape: tuple[int, int]
    offset: int

    @property
    def size(self) -> int:
        return self.local_shape[0] * self.local_shape[1]

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.size].view(self.local_shape)

    def part_of(self, full: Tensor, tp_rank: int) -> Tensor:
        """The slice of the full matrix that tp_rank holds."""
        if self.split_dim is None:
            return full
        size = self.local_shape[self.split_dim]
        return full.narrow(self.split_dim, tp_rank * size, size)


def peft_key(path: str, letter: str) -> str:
    """PEFT's name of a matrix; letter is A or B."""
    return f"base_model.model.{path}.lora_{letter}.weight"


def shard_layout(wanted: Iterable[Projection], rank: int, tp_size: int) -> list[Shard]:
    """Where every matrix lies in the flat buffers: replicated ones first. The same on every TP rank."""
    matrices: list[tuple[str, str, tuple[int, int], int | None]] = []
    for projection in wanted:
        column = projection.sharding == "column"
        key_a, key_b = peft_key(projection.path, "A"), peft_key(projection.path, "B")
        matrices.append((key_a, projection.path, (rank, projection.d_in), None if column else 1))
        matrices.append((key_b, projection.path, (projection.d_out, rank), 0 if column else None))
    if tp_size == 1:
        matrices = [(key, path, shape, None) for key, path, shape, _ in matrices]
    matrices.sort(key=lambda matrix: matrix[3] is not None)  # stable: replicated first
    shards, offset = [], 0
    for key, path, shape, split_dim in matrices:
        rows, columns = shape
        local = shape
        if split_dim is not None:
            local = (rows // tp_size, columns) if split_dim == 0 else (rows, columns // tp_size)
        shards.append(Shard(key, path, shape, split_dim, local, offset))
        offset += shards[-1].size
    return shards


class Adapter:
    """A trainable adapter on one rank.

    Attributes:
        weights, grads, exp_avg, exp_avg_sq: float32 [num_local] on the model's device.
        num_replicated: the first entries, equal on all TP ranks.
        step: optimizer steps taken.
        has_gradients: a pass has added to grads since they were last zeroed.
    """

    def __init__(
        self,
        wanted: Sequence[Projection],
        *,
        rank: int,
        alpha: float,
        targets: tuple[str, ...],
        tp_rank: int,
        tp_size: int,
        device: torch.device,
    ) -> None:
        self.shards = shard_layout(wanted, rank, tp_size)
        self.tp_rank, self.tp_size = tp_rank, tp_size
        num_local = sum(shard.size for shard in self.shards)
        self.num_replicated = sum(shard.size for shard in self.shards if shard.split_dim is None)
        self.weights, self.grads, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(num_local, dtype=torch.float32, device=device) for _ in range(4)
        )
        self.step = 0
        self.has_gradients = False
        parameters: dict[str, Tensor] = {}
        for shard in self.shards:
            parameter = nn.Parameter(shard.view(self.weights))
            parameter.grad = shard.view(self.grads)  # autograd adds into an existing gradient in place
            parameters[shard.key] = parameter
        pairs = {
            projection.path: LoraPair(
                parameters[peft_key(projection.path, "A")], parameters[peft_key(projection.path, "B")]
            )
            for projection in wanted
        }
        self.lora = LoraWeights(rank, alpha, targets, pairs)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters over all TP ranks, replicated ones counted once."""
        return self.num_replicated + (self.weights.numel() - self.num_replicated) * self.tp_size

    def zero_grad(self) -> None:
        self.grads.zero_()
        self.has_gradients = False

    def restore_grad(self, saved: Tensor | None) -> None:
        """Back to an earlier copy of grads; None means there were none."""
        if saved is None:
            self.zero_grad()
        else:
            self.grads.copy_(saved)

    def initialize(self, seed: int) -> None:
        """A as PEFT draws it (Kaiming uniform with a = sqrt(5): bound 1 / sqrt(d_in)), B zero.

        Every matrix has a generator of its own and is drawn whole on the CPU, so the numbers depend on the seed and
        the name only: not on the layout, the device or which other projections are trained.
        """
        with torch.no_grad():
            for shard in self.shards:
                view = shard.view(self.weights)
                if not shard.key.endswith("lora_A.weight"):
                    view.zero_()
                    continue
                full = torch.empty(shard.full_shape, dtype=torch.float32)
                bound = 1.0 / math.sqrt(shard.full_shape[1])
                full.uniform_(-bound, bound, generator=_generator(seed, shard.path))
                view.copy_(shard.part_of(full, self.tp_rank))


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
