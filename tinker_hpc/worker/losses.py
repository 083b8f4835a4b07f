"""The losses: name -> function. The one place where a loss is computed.

What a loss takes (inputs, config keys, defaults) stands in `tinker_hpc/loss_table.py`, which the client side can
import; what it computes stands here. To add one: write the function, put it into `LOSSES`, set `offered` there.

All are token-level and return the SUM over the tokens of a micro-batch: no mean, no normalisation.
Legend: p training log-probability, q sampling log-probability, A advantage, r = exp(p - q); T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_adapters.interface import LossFn
from tinker_hpc.errors import RequestError
from tinker_hpc.loss_table import KNOWN_LOSSES

LossFunction = Callable[[Tensor, Mapping[str, Tensor], Tensor, Mapping[str, float]], Tensor]
"""(logprobs_T float32, inputs_T by key, segment_ids_T int64, config) -> scalar. Our names: `sampling_logprobs`."""


@dataclass(frozen=True)
class Loss:
    """One entry of the registry."""

    function: LossFunction
    source: str


def cross_entropy(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor, config: Mapping[str, float]
) -> Tensor:
    """-(p * weights).sum(); `weights` float32 [T] may be negative (that is how custom losses send their gradient)."""
    return -(logprobs_T * inputs["weights"]).sum()


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, "tinker-cookbook docs/losses.mdx:60"),
}


def bind(name: str, config: Mapping[str, float]) -> LossFn:
    """The loss as the engine calls it, defaults of `config` filled in.

    Raises: RequestError for a name or a config key the registry lacks.
    """
    if name not in LOSSES:
        raise RequestError(f"loss_fn {name!r} is not computed by this worker. Use one of: {', '.join(LOSSES)}.")
    defaults = KNOWN_LOSSES[name].config
    unknown = sorted(set(config) - set(defaults))
    if unknown:
        allowed = ", ".join(defaults) or "none"
        raise RequestError(f"loss_fn_config has {', '.join(unknown)}; loss_fn {name!r} allows: {allowed}.")
    function, complete = LOSSES[name].function, {**defaults, **config}

    def loss(logprobs_T: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor) -> Tensor:
        return function(logprobs_T, inputs, segment_ids_T, complete)

    return loss
