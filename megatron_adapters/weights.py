"""Hugging Face safetensors -> this rank's shard of the megatron-core model.

Only the slices a rank needs are read. Before anything is read, names and shapes of the whole checkpoint are compared
with what the architecture requires, so that a wrong folder fails at once and with a list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinker_hpc.errors import WeightsError

from .experts import StackedExperts
from .families import Architecture
from .interface import Layout
from .moe import MoeMlp
from .placement import Place, kv_heads_of_rank

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers that old exports carry; we compute them."""


class Checkpoint:
    """A folder with model.safetensors, or with shards and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {path.name: _open(path) for path in _safetensors_files(folder)}
        self._file_of = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def read(self, name: str, dim: int | None = None, part: int = 0, parts: int = 1) -> Tensor:
        """Tensor `name`, or slice `part` of `parts` along `dim`; only that slice is read from disk.

        The slices are equal, but for the last where `parts` does not divide the tensor.
        """
        if dim is None or parts == 1:
            return self._file_of[name].get_tensor(name)
        view = self._file_of[name].get_slice(name)
        whole = view.get_shape()[dim]
        size = -(-whole // parts)
        start, end = part * size, min((part + 1) * size, whole)
        return view[start:end] if dim == 0 else view[:, start:end]


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this architecture must hold, with its full shape."""
    hidden, ffn, q, kv = arch.hidden_size, arch.ffn_size, arch.q_size, arch.kv_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not arch.tied_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (q, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, q),
        }
        if layer in arch.expert_layers and arch.experts is not None:
            shapes[f"{prefix}mlp.gate.weight"] = (arch.experts.count, hidden)
            for expert in range(arch.experts.count):
                shapes |= _mlp_shapes(f"{prefix}mlp.experts.{expert}.", hidden, arch.experts.ffn_size)
        else:
            shapes |= _mlp_shapes(f"{prefix}mlp.", hidden, ffn)
        if arch.qkv_bias:
            shapes |= {f"{prefix}self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        if arch.qk_norm:
            shapes |= {f"{prefix}self_attn.{x}_norm.weight": (arch.head_dim,) for x in "qk"}
    return shapes


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (ffn, hidden),
        f"{prefix}up_proj.weight": (ffn, hidden),
        f"{prefix}down_proj.weight": (hidden, ffn),
    }


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes.

    Raises: WeightsError naming what is missing, unexpected or misshapen.
    """
    complaints = []
    if missing := sorted(expected.keys() - found.keys()):
        complaints.append(f"missing: {_listing(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        complaints.append(f"unexpected: {_listing(extra)}")
    wrong = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        complaints.append(f"wrong shape: {_listing(wrong)}")
    if complaints:
        raise WeightsError(
            f"the tensors in {where} do not fit. {'; '.join(complaints)}. "
            "Check that the weights and the configuration belong to the same model."
        )


@torch.no_grad()
def load_weights(model: Any, folder: Path, arch: Architecture, layout: Layout, place: Place) -> None:
    """Copy this rank's part of the checkpoint in `folder` into `model`, cast to the model's dtype.

    Args:
        model: this stage's megatron-core GPTModel with plain (not LoRA-wrapped) linear layers, MoeMlp for experts.
    Raises: WeightsError, on every rank alike, before any tensor is touched.
    Collectives: none; every rank reads its own slices, one tensor at a time.
    """
    checkpoint = Checkpoint(folder)
    found = {name: shape for name, shape in checkpoint.shapes.items() if not name.endswith(IGNORED_SUFFIXES)}
    if arch.tied_embeddings:
        found.pop("lm_head.weight", None)  # some exports repeat the tied matrix
    check_tensors(found, expected_shapes(arch), str(folder))
    tp_rank, tp_size = place.tp_rank, layout.tp_size

    def whole(name: str) -> Tensor:
        return checkpoint.read(name)

    def rows(name: str) -> Tensor:
        return checkpoint.read(name, 0, tp_rank, tp_size)

    def columns(name: str) -> Tensor:
        return checkpoint.read(name, 1, tp_rank, tp_size)

    def kv_rows(name: str) -> Tensor:
        parts = min(arch.num_kv_heads, tp_size)
        return checkpoint.read(name, 0, tp_rank * parts // tp_size, parts)

    def copy_padded(weight_VD: Tensor, part: Tensor) -> None:
        weight_VD[: len(part)].copy_(part)
        weight_VD[len(part) :].zero_()

    if model.pre_process:
        copy_padded(model.embedding.word_embeddings.weight, rows("model.embed_tokens.weight"))
    if model.post_process:
        model.decoder.final_layernorm.weight.copy_(whole("model.norm.weight"))
        if not model.share_embeddings_and_output_weights:  # tied ones are shared where one stage holds both ends
            name = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
            copy_padded(model.output_layer.weight, rows(name))
    groups = kv_heads_of_rank(arch.num_kv_heads, tp_size)

    def qkv(prefix: str, kind: str) -> Tensor:
        parts = [read(f"{prefix}{x}_proj.{kind}") for x, read in (("q", rows), ("k", kv_rows), ("v", kv_rows))]
        return interleave_qkv(*parts, groups=groups)

    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}."
        attention = layer.self_attention
        layer.input_layernorm.weight.copy_(whole(f"{prefix}input_layernorm.weight"))
        layer.pre_mlp_layernorm.weight.copy_(whole(f"{prefix}post_attention_layernorm.weight"))
        attention.linear_qkv.weight.copy_(qkv(f"{prefix}self_attn.", "weight"))
        if arch.qkv_bias:
            attention.linear_qkv.bias.copy_(qkv(f"{prefix}self_attn.", "bias"))
        if arch.qk_norm:
            attention.q_layernorm.weight.copy_(whole(f"{prefix}self_attn.q_norm.weight"))
            attention.k_layernorm.weight.copy_(whole(f"{prefix}self_attn.k_norm.weight"))
        attention.linear_proj.weight.copy_(columns(f"{prefix}self_attn.o_proj.weight"))
        if isinstance(layer.mlp, MoeMlp):
            layer.mlp.router.weight.copy_(whole(f"{prefix}mlp.gate.weight"))
            _load_experts(layer.mlp.experts, whole, f"{prefix}mlp.experts.", place.ep_rank)
        else:
            fc1 = torch.cat([rows(f"{prefix}mlp.gate_proj.weight"), rows(f"{prefix}mlp.up_proj.weight")])
            layer.mlp.linear_fc1.weight.copy_(fc1)
            layer.mlp.linear_fc2.weight.copy_(columns(f"{prefix}mlp.down_proj.weight"))


def _load_experts(experts: StackedExperts, whole: Callable[[str], Tensor], prefix: str, ep_rank: int) -> None:
    num_local, _, ffn = experts.down_EDF.shape
    for local in range(num_local):
        name = f"{prefix}{ep_rank * num_local + local}"
        experts.gate_up_EGD[local, :ffn].copy_(whole(f"{name}.gate_proj.weight"))
        experts.gate_up_EGD[local, ffn:].copy_(whole(f"{name}.up_proj.weight"))
        experts.down_EDF[local].copy_(whole(f"{name}.down_proj.weight"))


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int) -> Tensor:
    """Rows of q, k, v -> megatron-core's order: for every key-value group its queries, its key, its value.

    q [groups * queries * head_dim, ...], k and v [groups * head_dim, ...]: weights or biases, this rank's part.
    """
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        raise WeightsError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json. Only safetensors are read; "
            "convert other formats with transformers' save_pretrained."
        )
    if missing := [name for name in names if not (folder / name).exists()]:
        raise WeightsError(f"{index} names files that are not there: {_listing(missing)}. Download the model again.")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}). Download it again.") from error


def _listing(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
