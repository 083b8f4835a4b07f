"""Tinker's published losses once more, in numpy: (value, gradient by the logprobs). Written from the formulas of
tinker-cookbook's docs/losses.mdx, not from ours.

p training logprobs; x the inputs by key (`sampling_logprobs` for the wire's `logprobs`); segments numbers the
sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Array = np.ndarray
Inputs = Mapping[str, Array]
ClosedForm = Callable[[Array, Inputs, Array, Mapping[str, float]], tuple[float, Array]]


def cross_entropy(p: Array, x: Inputs, segments: Array, config: Mapping[str, float]) -> tuple[float, Array]:
    return -float(np.vdot(p, x["weights"])), -x["weights"]


def importance_sampling(p: Array, x: Inputs, segments: Array, config: Mapping[str, float]) -> tuple[float, Array]:
    weighted = np.exp(p - x["sampling_logprobs"]) * x["advantages"]
    return -float(weighted.sum()), -weighted


def bounds(x: Inputs, config: Mapping[str, float]) -> tuple[Array | float, Array | float]:
    return (
        x.get("clip_low_threshold", config["clip_low_threshold"]),
        x.get("clip_high_threshold", config["clip_high_threshold"]),
    )


def clipped(ratio: Array, x: Inputs, config: Mapping[str, float]) -> tuple[float, Array]:
    """Of min(r A, clamp(r) A): the clamp counts where the ratio has gone too far in the direction A wants."""
    low, high = bounds(x, config)
    advantages = x["advantages"]
    frozen = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    value = np.where(frozen, np.clip(ratio, low, high), ratio) * advantages
    return -float(value.sum()), np.where(frozen, 0.0, -ratio * advantages)


def ppo(p: Array, x: Inputs, segments: Array, config: Mapping[str, float]) -> tuple[float, Array]:
    return clipped(np.exp(p - x["sampling_logprobs"]), x, config)


def cispo(p: Array, x: Inputs, segments: Array, config: Mapping[str, float]) -> tuple[float, Array]:
    weights = np.clip(np.exp(p - x["sampling_logprobs"]), *bounds(x, config)) * x["advantages"]
    return -float((weights * p).sum()), -weights


def dro(p: Array, x: Inputs, segments: Array, config: Mapping[str, float]) -> tuple[float, Array]:
    distance = p - x["sampling_logprobs"]
    value = p * x["advantages"] - config["beta"] / 2 * distance**2
    return -float(value.sum()), -x["advantages"] + config["beta"] * distance


def gspo(p: Array, x: Inputs, segments: Array, config: Mapping[str, float]) -> tuple[float, Array]:
    ratio = np.ones_like(p)
    for segment in np.unique(segments):
        here = segments == segment
        counted = here & (x["sequence_ratio_mask"] != 0)
        if counted.any():
            ratio[here] = np.exp((p - x["sampling_logprobs"])[counted].mean())
    return clipped(ratio, x, config)


CLOSED: Mapping[str, ClosedForm] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}
