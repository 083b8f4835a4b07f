"""Which linear maps carry an adapter, by their Hugging Face names, and how many parameters that must give.

One list serves the LoRA layers, the optimizer, the files and the count, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .families import Architecture

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""With latent attention: q_proj, or q_a_proj and q_b_proj."""
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBED = ("lm_head",)
ROW_PARALLEL = ("o_proj", "down_proj")
"""Input sharded over TP; all others have their output sharded (column parallel)."""

WHOLE = ("q_a_proj", "kv_a_proj_with_mqa")
"""Held whole by every TP rank."""

EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Stacked matrices of all experts, by the names Tinker's checkpoints give them."""


@dataclass(frozen=True)
class Projection:
    """One frozen matrix W [d_out, d_in], or one per expert, and the place of its A [rank, d_in] and B [d_out, rank].

    Sharding over TP (Megatron's rule): column: A replicated, B split by rows; row: A split by columns, B replicated;
    whole: both replicated, each rank with its share of the tokens.
    Sharding over EP: matrices of an expert lie where the expert lies; a matrix that all experts share is replicated.
    """

    path: str
    """the module's Hugging Face path, e.g. model.layers.0.self_attn.q_proj; experts: model.layers.0.mlp.experts.w1"""
    d_in: int
    d_out: int
    sharding: Literal["column", "row", "whole", "expert"]
    experts_a: int | None = None
    """Experts' A are stacked, [experts_a, rank, d_in]: 1 where all share it. None: a plain matrix, no experts."""
    experts_b: int | None = None
    heads: int | None = None
    """d_out is this many key-value heads: where TP has more ranks than heads, consecutive ranks hold the same one."""

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]

    def shape_a(self, rank: int) -> tuple[int, ...]:
        return (rank, self.d_in) if self.experts_a is None else (self.experts_a, rank, self.d_in)

    def shape_b(self, rank: int) -> tuple[int, ...]:
        return (self.d_out, rank) if self.experts_b is None else (self.experts_b, self.d_out, rank)


def layer_path(layer: int, name: str) -> str:
    """Hugging Face path of a projection of decoder layer `layer` (from 0)."""
    block = "mlp" if name in MLP else "self_attn"
    return f"model.layers.{layer}.{block}.{name}"


def shared_expert_path(layer: int, name: str) -> str:
    """Of the MLP beside the experts."""
    return f"model.layers.{layer}.mlp.shared_experts.{name}"


def expert_path(layer: int, name: str) -> str:
    """Path of a stacked expert projection; name is gate_proj, up_proj or down_proj."""
    return f"model.layers.{layer}.mlp.experts.{EXPERT_NAMES[name]}"


def attention_names(arch: Architecture) -> tuple[str, ...]:
    if arch.latent is None:
        return ATTENTION
    others = ("q_a_proj", "q_b_proj") if arch.latent.q_rank is None else ("q_proj",)
    return tuple(name for name in LATENT_ATTENTION if name not in others)


def target_names(
    *, train_attn: bool, train_mlp: bool, train_unembed: bool, attention: tuple[str, ...] = ATTENTION
) -> tuple[str, ...]:
    """Projection names (PEFT's target_modules) that the three switches select; MLP includes the experts.

    Args: attention: `attention_names` of the architecture.
    """
    return (attention if train_attn else ()) + (MLP if train_mlp else ()) + (UNEMBED if train_unembed else ())


def projections(
    arch: Architecture, targets: Iterable[str], *, per_expert: bool = False, layers: Sequence[int] | None = None
) -> list[Projection]:
    """Every adapted matrix of the model, layer by layer, the unembedding last.

    Args:
        per_expert: every expert has its own A and B. Else "shared-outer", as Tinker trains: of each expert matrix the
            factor on the hidden side (A of w1 and w3, B of w2) is shared by all experts of the layer.
        layers: only these, and the unembedding only with the last one: a pipeline stage. None: all.
    """
    widths = attention_widths(arch) | {
        "gate_proj": (arch.hidden_size, arch.ffn_size),
        "up_proj": (arch.hidden_size, arch.ffn_size),
        "down_proj": (arch.ffn_size, arch.hidden_size),
        "lm_head": (arch.hidden_size, arch.vocab_size),
    }
    wanted = set(targets)
    layers = range(arch.num_layers) if layers is None else layers
    found = []
    for layer in layers:
        for name in attention_names(arch) + MLP:
            if name not in wanted:
                continue
            if name in MLP and layer in arch.expert_layers:
                found.append(_expert_projection(arch, layer, name, per_expert))
                found.extend(_shared_projection(arch, layer, name))
            else:
                sharding = _sharding(name)
                heads = arch.num_kv_heads if name in ("k_proj", "v_proj") else None
                found.append(Projection(layer_path(layer, name), *widths[name], sharding, heads=heads))
    if "lm_head" in wanted and arch.num_layers - 1 in layers:
        found.append(Projection("lm_head", *widths["lm_head"], "column"))
    return found


def attention_widths(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the attention's projections."""
    hidden, latent = arch.hidden_size, arch.latent
    widths = {"q_proj": (hidden, arch.q_size), "o_proj": (arch.num_heads * arch.value_dim, hidden)}
    if latent is None:
        return widths | {"k_proj": (hidden, arch.kv_size), "v_proj": (hidden, arch.kv_size)}
    if latent.q_rank is not None:
        widths |= {"q_a_proj": (hidden, latent.q_rank), "q_b_proj": (latent.q_rank, arch.q_size)}
    return widths | {
        "kv_a_proj_with_mqa": (hidden, latent.kv_rank + latent.rope_dim),
        "kv_b_proj": (latent.kv_rank, arch.num_heads * (latent.nope_dim + latent.value_dim)),
    }


def _sharding(name: str) -> Literal["column", "row", "whole"]:
    return "whole" if name in WHOLE else "row" if name in ROW_PARALLEL else "column"


def _shared_projection(arch: Architecture, layer: int, name: str) -> list[Projection]:
    assert arch.experts is not None
    hidden, ffn = arch.hidden_size, arch.experts.shared_ffn_size
    widths = (ffn, hidden) if name == "down_proj" else (hidden, ffn)
    return [Projection(shared_expert_path(layer, name), *widths, _sharding(name))] if ffn else []


def _expert_projection(arch: Architecture, layer: int, name: str, per_expert: bool) -> Projection:
    assert arch.experts is not None
    count, hidden, ffn = arch.experts.count, arch.hidden_size, arch.experts.ffn_size
    shared = count if per_expert else 1
    path = expert_path(layer, name)
    if name == "down_proj":
        return Projection(path, ffn, hidden, "expert", count, shared)
    return Projection(path, hidden, ffn, "expert", shared, count)


def parameters_per_rank(
    arch: Architecture, *, train_attn: bool, train_mlp: bool, train_unembed: bool, per_expert: bool = False
) -> int:
    """Trainable parameters per unit of LoRA rank, by the closed formula ("LoRA Without Regret" / Tinker's table).

    attention L*[(H+q) + 2(H+kv) + (q+H)], MLP L*3*(H+I), unembedding H+V; layers with E experts L*3*(H + E*I), or
    with factors per expert L*3*E*(H+I), and 3*(H+S) for an MLP of width S beside them; latent attention as its matrices
    are. Independent of the tensors, which are checked against it.
    """
    hidden = arch.hidden_size
    attention = arch.num_layers * ((hidden + arch.q_size) + 2 * (hidden + arch.kv_size) + (arch.q_size + hidden))
    if arch.latent is not None:
        latent, heads = arch.latent, arch.num_heads
        queries = hidden + arch.q_size + (0 if latent.q_rank is None else 2 * latent.q_rank)
        down = hidden + latent.kv_rank + latent.rope_dim
        up = latent.kv_rank + heads * (latent.nope_dim + latent.value_dim)
        attention = arch.num_layers * (queries + down + up + heads * latent.value_dim + hidden)
    mlp = (arch.num_layers - len(arch.expert_layers)) * 3 * (hidden + arch.ffn_size)
    if arch.experts is not None:
        count, ffn = arch.experts.count, arch.experts.ffn_size
        per_layer = count * (hidden + ffn) if per_expert else hidden + count * ffn
        if arch.experts.shared_ffn_size:
            per_layer += hidden + arch.experts.shared_ffn_size
        mlp += len(arch.expert_layers) * 3 * per_layer
    return attention * train_attn + mlp * train_mlp + (hidden + arch.vocab_size) * train_unembed
