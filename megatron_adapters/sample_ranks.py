"""How the ranks share sampling: TP ranks take the same tokens, DP ranks take different requests.

Decisions are the same on every rank because every rank knows every request and every finished sequence; only the
drawn tokens (TP) and the finished sequences (DP) travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Event = TypeVar("Event")


@dataclass(frozen=True)
class SampleRanks:
    """This rank's place, and the groups to talk over; the groups may be None where the size is 1.

    Pipeline stages behave as TP ranks do: they take the same tokens.
    """

    tp_size: int = 1
    tp_rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    dp_size: int = 1
    dp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    pp_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None
    """gloo over all ranks"""

    @property
    def world_size(self) -> int:
        return self.tp_size * self.dp_size * self.pp_size

    def agree(self, tokens_B: Tensor, logprobs_B: Tensor) -> tuple[list[int], list[float]]:
        """What TP rank 0 drew. Its word is taken so that a last-bit difference can never part the ranks.

        Args: tokens_B: int64 [B]; logprobs_B: float32 [B]; of the right shape on every rank, read on TP rank 0 only.
        Collectives: one broadcast over tp_group where tp_size > 1, one over pp_group where pp_size > 1.
        """
        if self.tp_size * self.pp_size > 1 or tokens_B.is_cuda:  # one copy to the host, which waits for the device
            both_2B = torch.stack([tokens_B.double(), logprobs_B.double()])  # exact: ids stay below 2**53
            if self.tp_size > 1:
                dist.broadcast(both_2B, group=self.tp_group, group_src=0)
            if self.pp_size > 1:
                dist.broadcast(both_2B, group=self.pp_group, group_src=0)
            tokens, logprobs = both_2B.tolist()
            return [int(token) for token in tokens], logprobs
        return tokens_B.tolist(), logprobs_B.tolist()

    def exchange(self, events: list[Event]) -> list[Event]:
        """The events of all DP ranks, in DP order, on every rank.

        Collectives: where dp_size > 1, over control_group one all-reduce of a flag, and one all-gather of objects when
        any rank has an event.
        """
        if self.dp_size == 1:
            return events
        flag = torch.tensor([len(events)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control_group)
        if not flag.item():
            return []
        # TP ranks and stages hold the same events; one copy is enough
        mine = events if self.tp_rank == self.pp_rank == 0 else []
        gathered: list[list[Event]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, mine, group=self.control_group)
        return [event for part in gathered for event in part]

    def agree_on_least(self, value: int) -> int:
        """The smallest of all ranks' values. Collectives: one all-reduce over control_group, unless alone."""
        if self.world_size == 1:
            return value
        least = torch.tensor([value])
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.control_group)
        return int(least.item())


@dataclass
class Shares:
    """Deals samples out to DP ranks; every rank deals for all, so nothing is sent."""

    dp_size: int
    loads: list[int] = field(init=False)
    """Sequences each DP rank still has."""

    def __post_init__(self) -> None:
        self.loads = [0] * self.dp_size

    def deal(self, num_samples: Sequence[int]) -> list[list[tuple[int, range]]]:
        """For every request that arrived together, which DP rank takes which of its samples.

        A request stays whole, since its prompt is computed once per rank, unless there are fewer requests than ranks.

        Returns: for each request a list of (dp_rank, range of sample indices).
        """
        split = len(num_samples) < self.dp_size
        return [self._deal_one(count, split) for count in num_samples]

    def _deal_one(self, count: int, split: bool) -> list[tuple[int, range]]:
        num_parts = min(count, self.dp_size) if split else 1
        bounds = [count * part // num_parts for part in range(num_parts + 1)]
        parts = []
        for start, end in pairwise(bounds):
            dp_rank = min(range(self.dp_size), key=lambda rank: (self.loads[rank], rank))
            self.loads[dp_rank] += end - start
            parts.append((dp_rank, range(start, end)))
        return parts

    def done(self, dp_rank: int, num_samples: int) -> None:
        """These many sequences of that rank ended."""
        self.loads[dp_rank] -= num_samples
