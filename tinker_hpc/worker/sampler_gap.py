"""How far the sampler's logprobs are from the trainer's, on every pass of a loss that is given both. Pure.

With the weights that sampled it is numerics alone: sampler and trainer run different operations, in another order.
tests/benchmarks/bench_sampler_gap.py measures it on 12 layers x 512: in float32 4e-6 on average and 2e-5 at most, in
bfloat16 0.03 and 0.13 (transformers' own generate and forward: 0.02 and 0.10), so an importance ratio is off by a few
per cent a token there. With experts a rounding may choose another expert, in bfloat16 that moves a few tokens by a nat,
unless routing is replayed (megatron_adapters/routing_replay.py).
Much larger says that sampler and trainer compute different things. With older weights it is also how far off-policy the
data are. Tokens without advantage do not count: prompts and observations carry made-up logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_adapters.interface import Datum


@dataclass(frozen=True)
class SamplerGap:
    """Of |trainer - sampler| in nats: the sum, the largest, and over how many tokens."""

    total: float = 0.0
    largest: float = 0.0
    num_tokens: int = 0

    def __add__(self, other: SamplerGap) -> SamplerGap:
        return SamplerGap(
            self.total + other.total, max(self.largest, other.largest), self.num_tokens + other.num_tokens
        )

    def metrics(self) -> dict[str, float]:
        """As a pass reports them, named as tinker reduces them over chunks; nothing where no token counts."""
        if not self.num_tokens:
            return {}
        return {"sampler_gap:mean": self.total / self.num_tokens, "sampler_gap:max": self.largest}


def sampler_gap(data: Sequence[Datum], logprobs: Sequence[np.ndarray]) -> SamplerGap:
    """Args: logprobs: the trainer's, one array [N] per datum. `data` without `sampling_logprobs` have no gap."""
    gap = SamplerGap()
    for datum, trained_N in zip(data, logprobs, strict=True):
        sampled_N = datum.inputs.get("sampling_logprobs")
        advantages_N = datum.inputs.get("advantages")
        if sampled_N is None or sampled_N.shape != trained_N.shape:
            continue
        counted_N = np.ones(sampled_N.shape, bool) if advantages_N is None else advantages_N != 0
        if counted_N.any():
            apart = np.abs(trained_N.astype(np.float64) - sampled_N)[counted_N]
            gap += SamplerGap(float(apart.sum()), float(apart.max()), int(counted_N.sum()))
    return gap
