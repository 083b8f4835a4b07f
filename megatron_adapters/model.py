"""Step 6 of a request: the base model with its adapters. Before: engine.py. After: the loss, or token_sampler.py.

Training:  training_pass.py takes `stage` outputs from stage to stage; on the last, model.own_head.target_logprobs(...)
Decoding:  model.hidden_states with a context that has a cache, under torch.no_grad(), then model.head.logits on
           the rows wanted. T must be a multiple of tp_size (`padded_length`): pad with a dummy sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from . import recompute as recomputation
from .adapters import LoraWeights
from .attention import AttentionCache, PackedContext, packed_context
from .experts import StackedExperts
from .families import Architecture
from .head import LmHead
from .inference_layers import Wanted, inference_layers
from .interface import Layout
from .latent_attention import LatentAttention, latent_linears
from .layers import block_spec, transformer_config
from .links import Links
from .lora_linear import LoraLinear, Routing, Segment
from .lora_stack import Split
from .moe import MoeMlp, Router
from .placement import FIRST_RANK, Place, kv_heads_of_rank, stage_layers, vocab_rows_of_rank
from .projections import layer_path, shared_expert_path
from .rope import RotaryTable
from .routing_replay import Given
from .runtime import Runtime
from .stage_head import shared_head
from .swiglu import SwiGlu
from .weights import load_weights

Table = Sequence[LoraWeights | None] | None


def build_gpt(
    arch: Architecture, layout: Layout, dtype: torch.dtype, *, on_cpu: bool, place: Place = FIRST_RANK
) -> GPTModel:
    """A rank's shard of the base, frozen, its weights not yet set. megatron-core's groups must exist."""
    config = transformer_config(arch, layout, dtype, on_cpu=on_cpu)
    is_last = place.pp_rank == layout.pp_size - 1
    layers = stage_layers(arch.num_layers, layout, place.pp_rank)
    gpt = GPTModel(
        config,
        # A block specification is accepted, only not annotated.
        block_spec(config, arch, layers, is_last=is_last),  # type: ignore[arg-type]
        vocab_size=vocab_rows_of_rank(arch.vocab_size, layout.tp_size) * layout.tp_size,
        max_sequence_length=arch.max_context,
        pre_process=place.pp_rank == 0,
        post_process=is_last,
        position_embedding_type="none",
        # Two stages cannot share a matrix; frozen copies need no synchronising either.
        share_embeddings_and_output_weights=arch.tied_embeddings and layout.pp_size == 1,
    )
    decoder: Any = gpt.decoder
    for index, layer in enumerate(decoder.layers):
        # megatron-core counts as if all stages had equally many.
        layer.layer_number = layers[index] + 1
        # Attention counts the layers of its stage, as a cache does that holds those alone.
        if arch.latent is not None:
            layer.self_attention = LatentAttention(config, arch, layout.tp_size, dtype, _device(on_cpu))
        attention = layer.self_attention.core_attention
        attention.layer_number = index + 1
        attention.window = arch.window if layers[index] in arch.window_layers else None
        if arch.sinks:
            heads = arch.num_heads // layout.tp_size
            attention.sinks_H = nn.Parameter(torch.empty(heads, dtype=dtype, device=_device(on_cpu)))
        if layers[index] in arch.expert_layers:
            layer.mlp = _experts(config, arch, layers[index], layout, on_cpu=on_cpu)
    gpt.requires_grad_(False)
    return gpt


def _device(on_cpu: bool) -> torch.device | None:
    """None is torch's current default, which may be the meta device."""
    return None if on_cpu else torch.device("cuda")


def _experts(config: Any, arch: Architecture, layer: int, layout: Layout, *, on_cpu: bool) -> MoeMlp:
    assert arch.experts is not None
    where: dict[str, Any] = {"dtype": config.params_dtype, "device": _device(on_cpu)}
    stacked = StackedExperts(
        layer=layer,
        num_local=arch.experts.count // layout.ep_size,
        hidden_size=arch.hidden_size,
        experts=arch.experts,
        **where,
    )
    shared = None
    if arch.experts.shared_ffn_size:
        linears: Any = MLPSubmodules(ColumnParallelLinear, SwiGlu, RowParallelLinear)
        # Its own argument for the width reaches the first of the two linears alone (megatron-core 0.16.1).
        narrow = copy.copy(config)
        narrow.ffn_hidden_size = arch.experts.shared_ffn_size
        shared = MLP(narrow, linears)
    return MoeMlp(Router(arch.experts, arch.hidden_size, **where), stacked, shared)


class Model:
    """This rank's shard of the frozen base, its linears wrapped for LoRA.

    Attributes:
        head: the unembedding; with several stages its results reach all of them, without gradients.
        own_head: the unembedding of this rank: on the last stage, None on the others.
        gets_on: called before each piece of a long pass, with the number of its tokens: a sign that this rank works.
    """

    def __init__(
        self, runtime: Runtime, arch: Architecture, hf_config: Any, folder: Path, *, recompute: bool = False
    ) -> None:
        layout, place = runtime.layout, runtime.place
        self.layers = stage_layers(arch.num_layers, layout, place.pp_rank)
        gpt = build_gpt(arch, layout, runtime.dtype, on_cpu=runtime.device.type == "cpu", place=place)
        self.arch = arch
        self.runtime = runtime
        self.gets_on: Callable[[int], None] = lambda num_tokens: None
        self.routing = Routing(place.tp_rank, layout.tp_size)
        load_weights(gpt, folder, arch, layout, place)
        self.gpt = gpt.to(runtime.device).eval()  # eval: dropout modules become the identity
        self.rotary = RotaryTable(hf_config, arch.rope_dim, runtime.device)
        self.own_head = _head(gpt, arch, runtime) if runtime.is_last_stage else None
        self.head = shared_head(self.own_head, arch.vocab_size, runtime)
        _wrap_linears(self.gpt, arch, runtime, self.routing)
        self._always_recompute = recompute
        self._recompute = recomputation.install(gpt, self.routing)
        self._inference_layers = inference_layers(self.gpt.decoder, self.routing)

    def padded_length(self, num_tokens: int) -> int:
        """Tokens of a forward after padding: sequence parallelism needs equal shares, and no rank may have none."""
        return max(num_tokens + -num_tokens % self.runtime.layout.tp_size, self.runtime.layout.tp_size)

    def context(self, bounds: Sequence[int], positions_T: Tensor, cache: AttentionCache | None = None) -> PackedContext:
        """See attention.packed_context."""
        return packed_context(tuple(bounds), positions_T, self.rotary, cache)

    def stage(
        self,
        tokens_T: Tensor,
        context: PackedContext,
        segments: Sequence[Segment],
        *,
        arrived_L1D: Tensor | None = None,
        table: Table = None,
        recompute: bool = False,
        wanted: Wanted | None = None,
        given: Given | None = None,
    ) -> Tensor:
        """This stage's layers: hidden states of this rank's share of the tokens, [L, 1, D]; normed on the last stage.

        Args:
            tokens_T: int64 [T] on the model's device, T a multiple of tp_size; embedded on the first stage.
            segments: which tokens use which adapter; must tile 0..T.
            arrived_L1D: what the stage before made of them; None on the first stage.
            table: see Routing.use.
            recompute: do not keep the activations for the backward; the same on every rank that takes part.
            wanted: may be given on a last stage without TP and without gradients: the rows to return.
            given: of all tokens and all layers of the model, the experts to go through (routing_replay.py).
        Collectives: per layer the sequence-parallel gathers and reduce-scatters of megatron-core and LoRA over the TP
            group, and MoeMlp's over the EP group.
        """
        self._recompute.active = recompute or self._always_recompute
        with self.routing.use(segments, tokens_T.shape[0], table, given):
            if arrived_L1D is None:
                embedded: Tensor = self.gpt.embedding(tokens_T[None], None)
                # Experts exchange gradients in backward: on every rank and in every layer, whatever is trained.
                arrived_L1D = embedded.detach().requires_grad_(
                    self.arch.experts is not None and torch.is_grad_enabled()
                )
            if self._inference_layers is not None and not torch.is_grad_enabled():
                return self._inference_layers(arrived_L1D[:, 0], context, wanted)[:, None]
            self.gpt.decoder.set_input_tensor(arrived_L1D)
            hidden_L1D = self.gpt.decoder(arrived_L1D, attention_mask=None, packed_seq_params=context)
            return hidden_L1D if wanted is None else hidden_L1D[wanted.rows_N]

    def hidden_states(
        self,
        tokens_T: Tensor,
        context: PackedContext,
        segments: Sequence[Segment],
        table: Table = None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """Final (normed) hidden states of all tokens [T, D], equal on all TP ranks; on stages before the last, zeros.

        For one forward alone, without gradients where there are several stages. Arguments as for `stage`; of `wanted`
        tokens alone, [N, D], under any layout.
        Collectives: those of `stage`; between stages one message [L, 1, D]; at the end `whole_sequence`.
        """
        runtime, links = self.runtime, Links(self.runtime)
        num_tokens = tokens_T.shape[0]
        arrived = links.receive_hidden(num_tokens // runtime.layout.tp_size, self.arch.hidden_size)
        early = wanted if runtime.is_last_stage and runtime.layout.tp_size == 1 else None
        hidden_L1D = self.stage(tokens_T, context, segments, arrived_L1D=arrived, table=table, wanted=early)
        links.send_hidden(hidden_L1D)
        links.finish()
        if not runtime.is_last_stage:
            num_rows = num_tokens if wanted is None else len(wanted.rows_N)
            return hidden_L1D.new_zeros(num_rows, self.arch.hidden_size)
        hidden_TD = self.whole_sequence(hidden_L1D)
        return hidden_TD if wanted is None or early is not None else hidden_TD[wanted.rows_N]

    def whole_sequence(self, hidden_L1D: Tensor) -> Tensor:
        """[L, 1, D] of each TP rank -> [T, D] on all of them. Collectives: one all-gather over the TP group."""
        # Every rank's head sees all tokens but its own vocabulary, so gradients are summed on the way back.
        return gather_from_sequence_parallel_region(
            hidden_L1D[:, 0], tensor_parallel_output_grad=True, group=self.runtime.tp_group
        )


def _head(gpt: Any, arch: Architecture, runtime: Runtime) -> LmHead:
    unembedding = gpt.embedding.word_embeddings if gpt.share_embeddings_and_output_weights else gpt.output_layer
    rows = vocab_rows_of_rank(arch.vocab_size, runtime.layout.tp_size)
    vocab_start = runtime.tp_rank * rows
    # Without the padding at the end of the last rank: nothing sees it, so nothing can be sampled from it.
    weight_VD = unembedding.weight.detach()[: min(rows, arch.vocab_size - vocab_start)]
    return LmHead(weight_VD, vocab_start, arch.vocab_size, runtime.tp_group)


class _Fused(NamedTuple):
    """A linear of a layer, and the projections that it fuses; see LoraLinear."""

    linear: str
    names: tuple[str, ...]
    sharding: str
    split: Split


def _wrap_linears(gpt: nn.Module, arch: Architecture, runtime: Runtime, routing: Routing) -> None:
    tp_size = runtime.layout.tp_size
    groups = kv_heads_of_rank(arch.num_kv_heads, tp_size)
    q, kv, ffn = arch.q_size // tp_size, groups * arch.head_dim, arch.ffn_size // tp_size

    # megatron-core's order: per group its queries, key, value.
    def split_qkv(out_TO: Tensor) -> list[Tensor]:
        return list(out_TO.view(out_TO.shape[0], groups, -1).split((q // groups, kv // groups, kv // groups), dim=-1))

    def whole(out_TO: Tensor) -> list[Tensor]:
        return [out_TO]

    def one(linear: str, name: str, sharding: str) -> _Fused:
        return _Fused(linear, (name,), sharding, whole)

    def mlp_linears(width: int) -> list[_Fused]:
        def halves(out_TO: Tensor) -> list[Tensor]:
            return list(out_TO.split(width, dim=-1))

        gate_up = _Fused("linear_fc1", ("gate_proj", "up_proj"), "column", halves)
        return [gate_up, one("linear_fc2", "down_proj", "row")]

    attention = [_Fused("linear_qkv", ("q_proj", "k_proj", "v_proj"), "column", split_qkv)]
    if arch.latent is not None:
        attention = [one(*linear) for linear in latent_linears(arch.latent)]
    attention.append(one("linear_proj", "o_proj", "row"))

    def wrap(owner: nn.Module, linears: list[_Fused], path: Callable[[str], str]) -> None:
        for linear, names, sharding, split in linears:
            wrapped = LoraLinear(
                getattr(owner, linear),
                [path(name) for name in names],
                sharding=sharding,
                split=split,
                routing=routing,
                tp_group=runtime.tp_group,
            )
            setattr(owner, linear, wrapped)

    decoder: Any = gpt.decoder
    for layer in decoder.layers:
        index = layer.layer_number - 1
        wrap(layer.self_attention, attention, partial(layer_path, index))
        if not isinstance(layer.mlp, MoeMlp):
            wrap(layer.mlp, mlp_linears(ffn), partial(layer_path, index))
            continue
        layer.mlp.connect(routing, runtime.ep_group, arch.expert_place(index))
        if layer.mlp.shared is not None and arch.experts is not None:
            width = arch.experts.shared_ffn_size // tp_size
            wrap(layer.mlp.shared, mlp_linears(width), partial(shared_expert_path, index))
