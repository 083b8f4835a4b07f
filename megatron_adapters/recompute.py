"""Activation recomputation: of each layer only the input is kept, the rest is computed again in the backward.

torch's own non-reentrant checkpoint instead of megatron-core's: that one gives LoRA no gradient where the embedding
is frozen, and saves CUDA's random state, of which a model without dropout has no use.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .lora_linear import Routing


def recompute_layers(gpt: Any, routing: Routing) -> None:
    """From now on every decoder layer of the model recomputes, where gradients are wanted at all."""
    for layer in gpt.decoder.layers:
        layer.forward = partial(_forward, layer.forward, routing)


def _forward(compute: Any, routing: Routing, *, hidden_states: torch.Tensor, **arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return compute(hidden_states=hidden_states, **arguments)
    state = routing.all, routing.local, routing.table  # of another micro-batch when the backward comes

    def routed(hidden_L1D: torch.Tensor) -> Any:
        with routing.as_it_was(*state):
            return compute(hidden_states=hidden_L1D, **arguments)

    # early_stop off: every rank must repeat every collective of the layer.
    return checkpoint(routed, hidden_states, use_reentrant=False, preserve_rng_state=False, early_stop=False)
