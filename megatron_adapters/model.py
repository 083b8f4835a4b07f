"""Step 6 of a request: the base model with its adapters. Before: engine.py. After: the loss, or token_sampler.py.

Training:  hidden = model.hidden_states(tokens_T, context, segments); model.head.target_logprobs(hidden, ...)
Decoding:  the same hidden_states with a context that has a cache, under torch.no_grad(), then model.head.logits on
           the rows wanted. T must be a multiple of tp_size (`padded_length`): pad with a dummy sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from .attention import AttentionCache, PackedContext, packed_context
from .families import Architecture
from .head import LmHead
from .interface import Layout
from .layers import block_spec, transformer_config
from .lora_linear import LoraLinear, Routing, Segment
from .projections import layer_path
from .rope import RotaryTable
from .runtime import Runtime
from .weights import load_weights

Merge = Callable[[list[Tensor]], Tensor]
Split = Callable[[Tensor], list[Tensor]]
"""Between the outputs of several projections and their fused layout; see LoraLinear."""


def build_gpt(arch: Architecture, layout: Layout, dtype: torch.dtype, *, on_cpu: bool) -> GPTModel:
    """This rank's shard of the base, frozen, its weights not yet set. megatron-core's groups must exist."""
    config = transformer_config(arch, layout, dtype, on_cpu=on_cpu)
    gpt = GPTModel(
        config,
        block_spec(config),  # type: ignore[arg-type]  # a block specification is accepted, only not annotated
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.max_context,
        position_embedding_type="none",
        share_embeddings_and_output_weights=arch.tied_embeddings,
    )
    gpt.requires_grad_(False)
    return gpt


class Model:
    """This rank's shard of the frozen base, its linears wrapped for LoRA."""

    def __init__(self, runtime: Runtime, arch: Architecture, hf_config: Any, folder: Path) -> None:
        layout = runtime.layout
        gpt = build_gpt(arch, layout, runtime.dtype, on_cpu=runtime.device.type == "cpu")
        load_weights(gpt, folder, arch, runtime.tp_rank, layout.tp_size)
        self.gpt = gpt.to(runtime.device).eval()  # eval: dropout modules become the identity
        self.arch = arch
        self.runtime = runtime
        self.rotary = RotaryTable(hf_config, arch.head_dim, runtime.device)
        self.routing = Routing(runtime.tp_rank, layout.tp_size)
        unembedding: Any = gpt.embedding.word_embeddings if arch.tied_embeddings else gpt.output_layer
        vocab_start = runtime.tp_rank * (arch.vocab_size // layout.tp_size)
        self.head = LmHead(unembedding.weight.detach(), vocab_start, runtime.tp_group)
        _wrap_linears(self.gpt, arch, runtime, self.routing)

    def padded_length(self, num_tokens: int) -> int:
        """Tokens of a forward after padding: sequence parallelism needs equal shares."""
        return num_tokens + -num_tokens % self.runtime.layout.tp_size

    def context(self, bounds: Sequence[int], positions_T: Tensor, cache: AttentionCache | None = None) -> PackedContext:
        """See attention.packed_context."""
        return packed_context(tuple(bounds), positions_T, self.rotary, cache)

    def hidden_states(self, tokens_T: Tensor, context: PackedContext, segments: Sequence[Segment]) -> Tensor:
        """Final (normed) hidden states of all tokens [T, D], equal on all TP ranks.

        Args:
            tokens_T: int64 [T] on the model's device, T a multiple of tp_size.
            segments: which tokens use which adapter; must tile 0..T.
        Collectives: per layer the sequence-parallel gathers and reduce-scatters of megatron-core and LoRA over the
            TP group, at the end one all-gather [T, D].
        """
        with self.routing.use(segments, tokens_T.shape[0]):
            embedded = self.gpt.embedding(tokens_T[None], None)
            hidden_L1D = self.gpt.decoder(embedded, attention_mask=None, packed_seq_params=context)
        # Every rank's head sees all tokens but its own vocabulary, so gradients are summed on the way back.
        return gather_from_sequence_parallel_region(
            hidden_L1D[:, 0], tensor_parallel_output_grad=True, group=self.runtime.tp_group
        )


def _wrap_linears(gpt: nn.Module, arch: Architecture, runtime: Runtime, routing: Routing) -> None:
    tp_size = runtime.layout.tp_size
    q, kv, ffn, hidden = arch.q_size // tp_size, arch.kv_size // tp_size, arch.ffn_size // tp_size, arch.hidden_size

    def merge_qkv(deltas: list[Tensor]) -> Tensor:
        """[T, q], [T, kv], [T, kv] -> megatron-core's order: per group its queries, key, value."""
        groups = arch.num_kv_heads // tp_size
        return torch.cat([x.view(x.shape[0], groups, -1) for x in deltas], dim=-1).flatten(1)

    def merge_side_by_side(deltas: list[Tensor]) -> Tensor:
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=-1)

    def split_qkv(out_TO: Tensor) -> list[Tensor]:
        groups = arch.num_kv_heads // tp_size
        return list(out_TO.view(out_TO.shape[0], groups, -1).split((q // groups, kv // groups, kv // groups), dim=-1))

    def split_gate_up(out_TO: Tensor) -> list[Tensor]:
        return list(out_TO.split(ffn, dim=-1))

    def whole(out_TO: Tensor) -> list[Tensor]:
        return [out_TO]

    fused: list[tuple[str, str, tuple[str, ...], str, tuple[int, ...], Merge, Split]] = [
        ("self_attention", "linear_qkv", ("q_proj", "k_proj", "v_proj"), "column", (q, kv, kv), merge_qkv, split_qkv),
        ("self_attention", "linear_proj", ("o_proj",), "row", (hidden,), merge_side_by_side, whole),
        ("mlp", "linear_fc1", ("gate_proj", "up_proj"), "column", (ffn, ffn), merge_side_by_side, split_gate_up),
        ("mlp", "linear_fc2", ("down_proj",), "row", (hidden,), merge_side_by_side, whole),
    ]
    decoder: Any = gpt.decoder
    for index, layer in enumerate(decoder.layers):
        for block, linear, names, sharding, out_sizes, merge, split in fused:
            owner = getattr(layer, block)
            wrapped = LoraLinear(
                getattr(owner, linear),
                [layer_path(index, name) for name in names],
                sharding=sharding,
                out_sizes=out_sizes,
                merge=merge,
                split=split,
                routing=routing,
                tp_group=runtime.tp_group,
            )
            setattr(owner, linear, wrapped)
