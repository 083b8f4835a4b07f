"""Activation recomputation: of each layer only the input is kept, the rest is computed again in the backward.

The numbers are the same to the bit, for a third more time. Ranks that share a micro-batch, or experts, must agree on
it: what is computed again includes its collectives.

torch's own non-reentrant checkpoint instead of megatron-core's: that one gives LoRA no gradient where the embedding
is frozen, and saves CUDA's random state, of which a model without dropout has no use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .lora_linear import Routing


@dataclass
class Recompute:
    """Whether the layers of a model recompute now; looked at in every forward that wants gradients."""

    active: bool = False


def install(gpt: Any, routing: Routing) -> Recompute:
    """Wrap the decoder layers of the model: they recompute while the returned switch is on."""
    switch = Recompute()
    for layer in gpt.decoder.layers:
        layer.forward = partial(_forward, layer.forward, routing, switch)
    return switch


def _forward(
    compute: Any, routing: Routing, switch: Recompute, *, hidden_states: torch.Tensor, **arguments: Any
) -> Any:
    if not (switch.active and torch.is_grad_enabled()):
        return compute(hidden_states=hidden_states, **arguments)
    routes = routing.routes  # those of another micro-batch when the backward comes

    def routed(hidden_L1D: torch.Tensor) -> Any:
        with routing.as_it_was(routes):
            return compute(hidden_states=hidden_L1D, **arguments)

    # early_stop off: every rank must repeat every collective of the layer.
    return checkpoint(routed, hidden_states, use_reentrant=False, preserve_rng_state=False, early_stop=False)
