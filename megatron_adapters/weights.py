"""Hugging Face safetensors -> this rank's shard of the megatron-core model.

Only the slices a rank needs are read. Before anything is read, names and shapes of the whole checkpoint are compared
with what the architecture requires, so that a wrong folder fails at once and with a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinker_hpc import quantised
from tinker_hpc.errors import WeightsError
from tinker_hpc.model_folder import listing, weight_files

from .expected_tensors import expected_shapes
from .experts import StackedExperts
from .families import Architecture
from .interface import Layout
from .moe import MoeMlp
from .placement import Place, kv_heads_of_rank

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers that old exports carry; we compute them."""


class Checkpoint:
    """A folder with model.safetensors, or with shards and their index. Quantised tensors are read as float32."""

    def __init__(self, folder: Path, fp8_block: quantised.Block | None = None) -> None:
        """fp8_block: `Architecture.fp8_block`. Raises: WeightsError."""
        self.folder = folder
        self._files = {path.name: _open(path) for path in weight_files(folder)}
        self._file_of = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118
        self._fp8_block = fp8_block
        views = {name: file.get_slice(name) for name, file in self._file_of.items()}
        found = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
        self._stored = quantised.as_the_model_has_them(found, fp8_block, str(folder))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As the model has them."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def entry(self, name: str, index: int) -> Tensor:
        """Entry `index` of the first dimension of tensor `name`; only that is read from disk."""
        stored = self._stored[name]
        codes = self._view(stored.numbers)[index : index + 1][0]
        if stored.scales is None:
            return codes
        scales = self._view(stored.scales)[index : index + 1][0]
        return torch.from_numpy(quantised.mxfp4_values(codes.numpy(), scales.numpy())).t()

    def read(self, name: str, dim: int | None = None, part: int = 0, parts: int = 1) -> Tensor:
        """Tensor `name`, or slice `part` of `parts` along `dim`; only that slice is read from disk.

        The slices are equal, but for the last where `parts` does not divide the tensor.
        """
        stored = self._stored[name]
        if stored.scales is None and (dim is None or parts == 1):
            return self._file_of[name].get_tensor(name)
        view = self._view(stored.numbers)
        cut = [slice(0, size) for size in stored.shape]
        if dim is not None:
            size = -(-stored.shape[dim] // parts)
            cut[dim] = slice(part * size, min((part + 1) * size, stored.shape[dim]))
        if stored.scales is None:
            return view[*cut]
        assert self._fp8_block is not None and not stored.is_mxfp4, f"{name} is read by entry"
        rows, columns = (quantised.touched(c.start, c.stop, n) for c, n in zip(cut, self._fp8_block, strict=True))
        scales = self._view(stored.scales)[rows[0], columns[0]].float().numpy()
        codes = view[*cut].view(torch.uint8).numpy()
        return torch.from_numpy(quantised.fp8_values(codes, scales, self._fp8_block, (rows[1], columns[1])))

    def _view(self, name: str) -> Any:
        return self._file_of[name].get_slice(name)


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes.

    Raises: WeightsError naming what is missing, unexpected or misshapen.
    """
    complaints = []
    if missing := sorted(expected.keys() - found.keys()):
        complaints.append(f"missing: {listing(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        complaints.append(f"unexpected: {listing(extra)}")
    wrong = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        complaints.append(f"wrong shape: {listing(wrong)}")
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
    checkpoint = Checkpoint(folder, arch.fp8_block)
    found = {name: shape for name, shape in checkpoint.shapes.items() if not name.endswith(IGNORED_SUFFIXES)}
    if arch.tied_embeddings:
        found.pop("lm_head.weight", None)  # some exports repeat the tied matrix
    for layer in range(arch.num_layers, arch.num_layers + arch.unread_layers):
        found = {name: shape for name, shape in found.items() if not name.startswith(f"model.layers.{layer}.")}
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

    def mlp(block: Any, prefix: str) -> None:
        block.linear_fc1.weight.copy_(torch.cat([rows(f"{prefix}gate_proj.weight"), rows(f"{prefix}up_proj.weight")]))
        block.linear_fc2.weight.copy_(columns(f"{prefix}down_proj.weight"))

    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}."
        attention = layer.self_attention
        layer.input_layernorm.weight.copy_(whole(f"{prefix}input_layernorm.weight"))
        layer.pre_mlp_layernorm.weight.copy_(whole(f"{prefix}post_attention_layernorm.weight"))
        if arch.latent is not None:
            _load_latent(attention, f"{prefix}self_attn.", rows, whole)
        else:
            attention.linear_qkv.weight.copy_(qkv(f"{prefix}self_attn.", "weight"))
        if arch.qkv_bias:
            attention.linear_qkv.bias.copy_(qkv(f"{prefix}self_attn.", "bias"))
        if arch.qk_norm:
            attention.q_layernorm.weight.copy_(whole(f"{prefix}self_attn.q_norm.weight"))
            attention.k_layernorm.weight.copy_(whole(f"{prefix}self_attn.k_norm.weight"))
        attention.linear_proj.weight.copy_(columns(f"{prefix}self_attn.o_proj.weight"))
        if arch.out_bias:
            attention.linear_proj.bias.copy_(whole(f"{prefix}self_attn.o_proj.bias"))
        if arch.sinks:
            attention.core_attention.sinks_H.copy_(rows(f"{prefix}self_attn.sinks"))
        if isinstance(layer.mlp, MoeMlp):
            assert arch.experts is not None
            router = f"{prefix}mlp.{arch.experts.router_name}."
            layer.mlp.router.weight.copy_(whole(f"{router}weight"))
            if layer.mlp.router.bias is not None:
                layer.mlp.router.bias.copy_(whole(f"{router}bias"))
            if layer.mlp.router.correction is not None:
                layer.mlp.router.correction.copy_(whole(f"{router}e_score_correction_bias"))
            if layer.mlp.shared is not None:
                mlp(layer.mlp.shared, f"{prefix}mlp.shared_experts.")
            load = _load_fused_experts if arch.experts.fused else _load_experts
            share = arch.experts.count // layout.ep_size
            mine = range(place.ep_rank * share, (place.ep_rank + 1) * share)
            load(layer.mlp.experts, checkpoint, f"{prefix}mlp.experts.", mine)
        else:
            mlp(layer.mlp, f"{prefix}mlp.")


def _load_latent(attention: Any, prefix: str, rows: Callable[[str], Tensor], whole: Callable[[str], Tensor]) -> None:
    """All but the output projection."""
    if attention.latent.q_rank is None:
        attention.linear_q.weight.copy_(rows(f"{prefix}q_proj.weight"))
    else:
        attention.linear_q_down.weight.copy_(whole(f"{prefix}q_a_proj.weight"))
        attention.q_layernorm.weight.copy_(whole(f"{prefix}q_a_layernorm.weight"))
        attention.linear_q_up.weight.copy_(rows(f"{prefix}q_b_proj.weight"))
    attention.linear_kv_down.weight.copy_(whole(f"{prefix}kv_a_proj_with_mqa.weight"))
    attention.kv_layernorm.weight.copy_(whole(f"{prefix}kv_a_layernorm.weight"))
    attention.linear_kv_up.weight.copy_(rows(f"{prefix}kv_b_proj.weight"))


def _load_experts(experts: StackedExperts, checkpoint: Checkpoint, prefix: str, mine: range) -> None:
    """Three tensors [out, in] for each expert."""
    ffn, whole = experts.down_EDF.shape[2], checkpoint.read
    for local, expert in enumerate(mine):
        name = f"{prefix}{expert}"
        experts.gate_up_EGD[local, :ffn].copy_(whole(f"{name}.gate_proj.weight"))
        experts.gate_up_EGD[local, ffn:].copy_(whole(f"{name}.up_proj.weight"))
        experts.down_EDF[local].copy_(whole(f"{name}.down_proj.weight"))


def _load_fused_experts(experts: StackedExperts, checkpoint: Checkpoint, prefix: str, mine: range) -> None:
    """Tensors [count, in, out] for all experts, gate and up taking turns in the last dimension."""
    ffn = experts.down_EDF.shape[2]
    for local, expert in enumerate(mine):
        gate_up_DG = checkpoint.entry(f"{prefix}gate_up_proj", expert)
        experts.gate_up_EGD[local, :ffn].copy_(gate_up_DG[:, ::2].t())
        experts.gate_up_EGD[local, ffn:].copy_(gate_up_DG[:, 1::2].t())
        experts.down_EDF[local].copy_(checkpoint.entry(f"{prefix}down_proj", expert).t())
        if experts.gate_up_bias_EG is not None and experts.down_bias_ED is not None:
            bias_G = checkpoint.entry(f"{prefix}gate_up_proj_bias", expert)
            experts.gate_up_bias_EG[local].copy_(torch.cat((bias_G[::2], bias_G[1::2])))
            experts.down_bias_ED[local].copy_(checkpoint.entry(f"{prefix}down_proj_bias", expert))


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int) -> Tensor:
    """Rows of q, k, v -> megatron-core's order: for every key-value group its queries, its key, its value.

    q [groups * queries * head_dim, ...], k and v [groups * head_dim, ...]: weights or biases, this rank's part.
    """
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}). Download it again.") from error
