"""The losses: name -> function. The one place where a loss is computed.

What a loss takes (inputs, config keys, defaults) stands in `tinker_hpc/loss_table.py`, which the client side can
import; what it computes stands here. To add one: declare it there, write the function, put it into `LOSSES`.

All are token-level and return the SUM over the tokens of a micro-batch: no mean, no normalisation.
Legend: p training log-probability, q sampling log-probability, A advantage, r = exp(p - q); T packed tokens. All are
float32 in the engine; any floating dtype works, which is how the tests compare with closed forms in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adapters.interface import LossFn
from tinker_hpc.errors import RequestError
from tinker_hpc.loss_table import CLIP_BOUNDS, KNOWN_LOSSES

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
    """-(p * weights).sum(); `weights` may be negative (that is how custom losses send their gradient).

    Logprobs and weights are [T], or [T, K] with K targets a position.
    """
    return -(logprobs_T * inputs["weights"]).sum()


def importance_sampling(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor, config: Mapping[str, float]
) -> Tensor:
    """-(r * A).sum(): the policy gradient, corrected for having been sampled from an older policy."""
    return -(_ratio(logprobs_T, inputs) * inputs["advantages"]).sum()


def ppo(logprobs_T: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor, config: Mapping[str, float]) -> Tensor:
    """-min(r * A, clamp(r, low, high) * A).sum(), Schulman et al. 2017, arXiv:1707.06347, equation 7."""
    return _clipped_objective(_ratio(logprobs_T, inputs), inputs, config)


def cispo(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor, config: Mapping[str, float]
) -> Tensor:
    """-(clamp(r, low, high).detach() * p * A).sum(), MiniMax-M1, arXiv:2506.13585, equation 4.

    The clamped ratio is a weight: unlike in ppo, clipped tokens keep a gradient.
    """
    weight_T = _clamp(_ratio(logprobs_T, inputs).detach(), inputs, config)
    return -(weight_T * logprobs_T * inputs["advantages"]).sum()


def dro(logprobs_T: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor, config: Mapping[str, float]) -> Tensor:
    """-(p * A - beta / 2 * (p - q)^2).sum(), Direct Reward Optimisation, arXiv:2405.19107."""
    distance_T = logprobs_T - inputs["sampling_logprobs"]
    return -(logprobs_T * inputs["advantages"] - 0.5 * config["beta"] * distance_T.square()).sum()


def gspo(
    logprobs_T: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor, config: Mapping[str, float]
) -> Tensor:
    """ppo with one ratio a sequence, GSPO-token of Zheng et al. 2025, arXiv:2507.18071, equation 14.

    The ratio of every token is exp(L + p - p.detach()), where L is the mean of p.detach() - q over the tokens of its
    sequence whose `sequence_ratio_mask` is not 0: its value is the sequence's, its gradient the token's. Where a
    sequence has no such token, L is 0. Sequences are whole in a micro-batch.
    """
    mask_T = (inputs["sequence_ratio_mask"] != 0).double()
    distance_T = (logprobs_T.detach() - inputs["sampling_logprobs"]).double()
    lengths = torch.unique_consecutive(segment_ids_T, return_counts=True)[1]
    # Not index_add: on CUDA it adds in an order of its own, and redoing a pass must give the same bits.
    sums, counts = (torch.segment_reduce(x, "sum", lengths=lengths) for x in (distance_T * mask_T, mask_T))
    mean_T = (sums / counts.clamp(min=1)).repeat_interleave(lengths).to(logprobs_T.dtype)
    return _clipped_objective((mean_T + logprobs_T - logprobs_T.detach()).exp(), inputs, config)


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, "tinker-cookbook docs/losses.mdx:60"),
    "importance_sampling": Loss(importance_sampling, "tinker-cookbook docs/losses.mdx:94"),
    "ppo": Loss(ppo, "tinker-cookbook docs/losses.mdx:132"),
    "cispo": Loss(cispo, "tinker-cookbook docs/losses.mdx:172"),
    "dro": Loss(dro, "tinker-cookbook docs/losses.mdx:208"),
    "gspo": Loss(gspo, "tinker-docs.thinkingmachines.ai/tinker/losses/gspo"),
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


def _ratio(logprobs_T: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return (logprobs_T - inputs["sampling_logprobs"]).exp()


def _clipped_objective(ratio_T: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """-min(ratio * A, clamp(ratio) * A).sum(). Inside the bounds both are equal: half the gradient goes each way."""
    advantages_T = inputs["advantages"]
    return -torch.minimum(ratio_T * advantages_T, _clamp(ratio_T, inputs, config) * advantages_T).sum()


def _clamp(ratio_T: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    """Into the bounds of the config; a bound given per token replaces its config key."""
    low, high = (
        inputs[key] if key in inputs else torch.full((), config[key], dtype=ratio_T.dtype, device=ratio_T.device)
        for key in CLIP_BOUNDS
    )
    return ratio_T.clamp(low, high)
