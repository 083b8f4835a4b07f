"""Which linear maps carry an adapter, by their Hugging Face names, and how many parameters that must give.

One list serves the LoRA layers, the optimizer, the files and the count, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .families import Architecture

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBED = ("lm_head",)
ROW_PARALLEL = ("o_proj", "down_proj")
"""Input sharded over TP; all others have their output sharded (column parallel)."""


@dataclass(frozen=True)
class Projection:
    """One frozen matrix W [d_out, d_in] and the place of its A [rank, d_in] and B [d_out, rank].

    Sharding over TP (Megatron's rule): column: A replicated, B split by rows; row: A split by columns, B replicated.
    """

    path: str
    """the module's Hugging Face path, e.g. model.layers.0.self_attn.q_proj"""
    d_in: int
    d_out: int
    sharding: Literal["column", "row"]

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]


def layer_path(layer: int, name: str) -> str:
    """Hugging Face path of a projection of decoder layer `layer` (from 0)."""
    block = "self_attn" if name in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{name}"


def target_names(*, train_attn: bool, train_mlp: bool, train_unembed: bool) -> tuple[str, ...]:
    """Projection names (PEFT's target_modules) that the three switches select."""
    return (ATTENTION if train_attn else ()) + (MLP if train_mlp else ()) + (UNEMBED if train_unembed else ())


def projections(arch: Architecture, targets: Iterable[str]) -> list[Projection]:
    """Every adapted matrix of the model, layer by layer, the unembedding last."""
    widths = {
        "q_proj": (arch.hidden_size, arch.q_size),
        "k_proj": (arch.hidden_size, arch.kv_size),
        "v_proj": (arch.hidden_size, arch.kv_size),
        "o_proj": (arch.q_size, arch.hidden_size),
        "gate_proj": (arch.hidden_size, arch.ffn_size),
        "up_proj": (arch.hidden_size, arch.ffn_size),
        "down_proj": (arch.ffn_size, arch.hidden_size),
        "lm_head": (arch.hidden_size, arch.vocab_size),
    }
    wanted = set(targets)
    found = [
        Projection(layer_path(layer, name), *widths[name], "row" if name in ROW_PARALLEL else "column")
        for layer in range(arch.num_layers)
        for name in ATTENTION + MLP
        if name in wanted
    ]
    if "lm_head" in wanted:
        found.append(Projection("lm_head", *widths["lm_head"], "column"))
    return found


def parameters_per_rank(arch: Architecture, *, train_attn: bool, train_mlp: bool, train_unembed: bool) -> int:
    """Trainable parameters per unit of LoRA rank, by the closed formula ("LoRA Without Regret" / Tinker's table).

    attention L*[(H+q) + 2(H+kv) + (q+H)], MLP L*3*(H+I), unembedding H+V. Independent of the tensors, which are
    checked against it.
    """
    layers, hidden = arch.num_layers, arch.hidden_size
    attention = layers * ((hidden + arch.q_size) + 2 * (hidden + arch.kv_size) + (arch.q_size + hidden))
    mlp = layers * 3 * (hidden + arch.ffn_size)
    return attention * train_attn + mlp * train_mlp + (hidden + arch.vocab_size) * train_unembed
