"""The unembedding's results on every pipeline stage: the last computes them, the others receive them.

Sampling runs the same loop on all stages, each with the keys and values of its own layers; so all must see the logits.

Shapes: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .head import LmHead
from .lora_linear import Segment
from .runtime import Runtime


class Head(Protocol):
    """What sampling uses of LmHead."""

    @property
    def vocab_size(self) -> int: ...

    def logits(self, hidden_ND: Tensor, segments: Sequence[Segment]) -> Tensor: ...

    def target_logprobs(self, hidden_TD: Tensor, targets: Tensor, segments: Sequence[Segment]) -> Tensor: ...


def shared_head(own: LmHead | None, vocab_size: int, runtime: Runtime) -> Head:
    """`own` where there is one stage; else one that shares its results."""
    if own is not None and runtime.layout.pp_size == 1:
        return own
    return _SharedHead(own, vocab_size, runtime)


class _SharedHead:
    def __init__(self, own: LmHead | None, vocab_size: int, runtime: Runtime) -> None:
        self._own = own
        self._runtime = runtime
        self.vocab_size = vocab_size

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        """As LmHead.logits. Collectives: its own on the last stage, then one broadcast [N, V] to the other stages."""
        if self._own is not None:
            return self._shared(self._own.logits(hidden_ND, segments))
        return self._shared(torch.empty(len(hidden_ND), self.vocab_size, device=hidden_ND.device))

    @torch.no_grad()
    def target_logprobs(self, hidden_TD: Tensor, targets: Tensor, segments: Sequence[Segment]) -> Tensor:
        """As LmHead.target_logprobs, without gradients. Collectives: its own, then one broadcast of the result."""
        if self._own is not None:
            return self._shared(self._own.target_logprobs(hidden_TD, targets, segments))
        return self._shared(torch.empty(targets.shape, device=hidden_TD.device))

    def _shared(self, result: Tensor) -> Tensor:
        result = result.contiguous()
        dist.broadcast(result, group=self._runtime.forward_group, group_src=self._runtime.layout.pp_size - 1)
        return result
