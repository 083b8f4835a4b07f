"""Tensors between pipeline stages. Shapes are known on both sides: every stage packs the same data by itself.

Shapes: L a TP rank's share of the tokens, D hidden.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .runtime import Runtime


class Links:
    """This rank's ends of the pipeline: from and to the ranks of the stages beside it with the same place otherwise.

    Sending waits for what was sent pp_size messages ago alone, so that tensors do not pile up where a stage is ahead of
    the next; `finish` waits for the rest. On the first stage nothing arrives, on the last nothing is sent.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stage = runtime.place.pp_rank
        self._sending: deque[tuple[Any, Tensor]] = deque()  # oldest first

    def receive_hidden(self, num_local: int, hidden_size: int) -> Tensor | None:
        """[L, 1, D] from the stage before; None on the first."""
        if self._runtime.is_first_stage:
            return None
        hidden = torch.empty(num_local, 1, hidden_size, dtype=self._runtime.dtype, device=self._runtime.device)
        dist.recv(hidden, group=self._runtime.forward_group, group_src=self._stage - 1)
        return hidden

    def send_hidden(self, hidden_L1D: Tensor) -> None:
        if not self._runtime.is_last_stage:
            self._send(hidden_L1D.detach(), self._runtime.forward_group, self._stage + 1)

    def receive_gradient(self, hidden_L1D: Tensor) -> Tensor:
        """The gradient of what was sent to the next stage; not for the last stage."""
        gradient = torch.empty_like(hidden_L1D)
        dist.recv(gradient, group=self._runtime.backward_group, group_src=self._stage + 1)
        return gradient

    def send_gradient(self, arrived_L1D: Tensor) -> None:
        """The gradient of what arrived from the stage before; not for the first stage."""
        gradient = arrived_L1D.grad if arrived_L1D.grad is not None else torch.zeros_like(arrived_L1D)
        self._send(gradient, self._runtime.backward_group, self._stage - 1)

    def _send(self, tensor: Tensor, group: dist.ProcessGroup, to_stage: int) -> None:
        while len(self._sending) >= self._runtime.layout.pp_size:
            self._wait_for_oldest()
        tensor = tensor.contiguous()
        self._sending.append((dist.isend(tensor, group=group, group_dst=to_stage), tensor))

    def finish(self) -> None:
        while self._sending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, _ = self._sending.popleft()
        work.wait()
