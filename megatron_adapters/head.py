"""The unembedding, fused with the log-probability of the target tokens, in chunks; large logits are never kept.

Two reasons not to use GPTModel's output layer: full logits of a packed batch are gigabytes, and its transposed
[T, 1, V] gradient runs as a batched matmul, 12 times slower than a 2-D one (megatron-core 0.16.1).

The vocabulary is sharded over TP: every rank computes its own columns for all tokens. Of the softmax only three
numbers a token travel: the largest logit, the sum of exponentials, the target's logit (K of them where a token has K
targets). The backward recomputes each chunk's logits from the saved hidden states, unless all of them together are no
larger than one chunk.

Shapes: T tokens, K targets a token, D hidden, V this rank's vocabulary rows, R rank, C tokens of a chunk, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .adapters import LoraPair
from .frozen_linear import frozen_linear, frozen_linear_grad
from .lora_linear import Segment, check_tiling
from .lora_stack import add_gradient_
from .placement import vocab_rows_of_rank
from .row_products import add_product_, linear_grad, linear_without_graph

PATH = "lm_head"
CHUNK_ELEMENTS = 2**26
"""float32 logits held at a time (256 MiB); a chunk of a 152k vocabulary is then about 440 tokens."""


@dataclass(frozen=True)
class LmHead:
    """The frozen unembedding of this rank.

    weight_VD: [vocab_size / tp_size, hidden], rounded up, the last rank with what is left; the embedding's own matrix
        where the two are tied.
    """

    weight_VD: Tensor
    vocab_start: int
    vocab_size: int
    tp_group: dist.ProcessGroup

    def target_logprobs(self, hidden_TD: Tensor, targets: Tensor, segments: Sequence[Segment]) -> Tensor:
        """log p of every target, float32 in the shape of `targets`. Differentiable in hidden_TD; the gradients of A and
        B are added to what they have (`.grad`) in the backward, as in lora_training.py.

        Args:
            hidden_TD: final hidden states of all tokens, equal on all TP ranks. Its gradient is this rank's part of
                a sum over TP (the reduce-scatter behind the gather adds it up).
            targets: int64 [T] or [T, K] global token ids; K targets share one softmax, and may repeat.
            segments: must tile 0..T.
        Collectives: forward, over the TP group: one all-reduce MAX [T], one all-reduce SUM [T, 1 + K]. Backward: none;
            the gradient of lm_head's A is a partial sum over TP (grad_sync.py).
        """
        check_tiling(segments, hidden_TD.shape[0])
        pieces = _pieces(segments)
        matrices = [matrix for piece in pieces if piece.pair is not None for matrix in piece.pair]
        targets_TK = targets.reshape(targets.shape[0], -1)
        logprobs_TK: Tensor = _TargetLogprobs.apply(hidden_TD, self, targets_TK, pieces, *matrices)  # type: ignore[assignment]
        return logprobs_TK.reshape(targets.shape)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Full-vocabulary logits of a few rows, float32 [N, vocab_size], equal on all TP ranks.

        Collectives: one all-gather of [N, V] over the TP group.
        """
        check_tiling(segments, hidden_ND.shape[0])
        if not len(hidden_ND):
            return torch.zeros(0, self.vocab_size, device=hidden_ND.device)
        chunk = _Chunk(0, len(hidden_ND), _pieces(segments))
        local_NV = _chunk_logits(hidden_ND, self.weight_VD, chunk, alike=False)
        if self.tp_group.size() == 1:
            return local_NV
        rows = vocab_rows_of_rank(self.vocab_size, self.tp_group.size())
        if local_NV.shape[1] < rows:  # gathered parts must be of equal size
            local_NV = F.pad(local_NV, (0, rows - local_NV.shape[1]))
        gathered = [torch.empty_like(local_NV) for _ in range(self.tp_group.size())]
        dist.all_gather(gathered, local_NV.contiguous(), group=self.tp_group)
        return torch.cat(gathered, dim=1)[:, : self.vocab_size]


@dataclass(frozen=True)
class _Piece:
    """Tokens start..end of one segment, and what it adds here; None: nothing."""

    start: int
    end: int
    pair: LoraPair | None
    scaling: float


@dataclass(frozen=True)
class _Chunk:
    """Tokens start..end, and the parts of segments among them: the base's logits are computed for all of them at once,
    however many adapters they have.
    """

    start: int
    end: int
    pieces: Sequence[_Piece]


def _chunks(pieces: Sequence[_Piece], num_tokens: int, vocab: int) -> Iterator[_Chunk]:
    """All tokens, in chunks as equal as can be of at most CHUNK_ELEMENTS logits."""
    count = -(-num_tokens // max(1, CHUNK_ELEMENTS // vocab))
    for start, end in pairwise(num_tokens * place // count for place in range(count + 1)):
        inside = [
            replace(piece, start=max(piece.start, start), end=min(piece.end, end))
            for piece in pieces
            if piece.start < end and piece.end > start
        ]
        yield _Chunk(start, end, inside)


def _pieces(segments: Sequence[Segment]) -> list[_Piece]:
    return [
        _Piece(segment.start, segment.end, segment.pairs([PATH])[0], segment.lora.scaling if segment.lora else 0.0)
        for segment in segments
    ]


def _chunk_logits(hidden_TD: Tensor, weight_VD: Tensor, chunk: _Chunk, *, alike: bool = True) -> Tensor:
    """This rank's logits of one chunk, float32 [C, V]. alike: by row_products.py, as training wants them."""
    logits_CV = frozen_linear(hidden_TD[chunk.start : chunk.end], weight_VD)
    for piece in chunk.pieces:
        if piece.pair is not None:
            h_ND = hidden_TD[piece.start : piece.end]
            a_RD, b_VR = (x.to(h_ND.dtype) for x in piece.pair)
            rows = logits_CV[piece.start - chunk.start : piece.end - chunk.start]
            if alike:
                add_product_(rows, linear_without_graph(h_ND, a_RD), b_VR.t(), piece.scaling)
            else:
                rows.addmm_(h_ND @ a_RD.t(), b_VR.t(), alpha=piece.scaling)
    return logits_CV.to(_wide(logits_CV.dtype))


class _TargetLogprobs(torch.autograd.Function):
    """See LmHead.target_logprobs. The derivative of log p(t) by the logits is onehot(t) - softmax."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head: LmHead, targets_TK: Tensor, pieces: list[_Piece], *matrices: Tensor
    ) -> Tensor:
        num_tokens, vocab = hidden_TD.shape[0], head.weight_VD.shape[0]
        wide = {"dtype": _wide(hidden_TD.dtype), "device": hidden_TD.device}
        largest_T = torch.zeros(num_tokens, **wide)
        # The sum of exponentials, then the logits of the targets: what is summed over TP, side by side.
        sums_TK = torch.zeros(num_tokens, 1 + targets_TK.shape[1], **wide)
        local_TK, inside_TK = _local_targets(targets_TK, head)
        kept: list[Tensor] | None = [] if num_tokens * vocab <= CHUNK_ELEMENTS and any(ctx.needs_input_grad) else None
        for chunk in _chunks(pieces, num_tokens, vocab):
            here = slice(chunk.start, chunk.end)
            logits_CV = _chunk_logits(hidden_TD, head.weight_VD, chunk)
            largest_T[here] = logits_CV.amax(dim=-1)
            sums_TK[here, 1:] = logits_CV.gather(1, local_TK[here]) * inside_TK[here]
            sums_TK[here, 0] = logits_CV.sub_(largest_T[here, None]).exp_().sum(dim=-1)
            if kept is not None:
                kept.append(logits_CV)
        local_largest_T = largest_T.clone()
        if head.tp_group.size() > 1:
            dist.all_reduce(largest_T, dist.ReduceOp.MAX, group=head.tp_group)
            sums_TK[:, 0] *= (local_largest_T - largest_T).exp()
            dist.all_reduce(sums_TK, group=head.tp_group)
        log_normalizer_T = largest_T + sums_TK[:, 0].log()
        ctx.save_for_backward(hidden_TD, local_TK, inside_TK, log_normalizer_T, local_largest_T)
        ctx.head, ctx.pieces, ctx.kept = head, pieces, kept
        return sums_TK[:, 1:] - log_normalizer_T[:, None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, local_TK, inside_TK, log_normalizer_T, local_largest_T = ctx.saved_tensors
        head: LmHead = ctx.head
        grad_TK = grad_outputs[0]
        grad_T = grad_TK.sum(dim=1)
        hidden_grad_TD = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        kept = None if ctx.kept is None else iter(ctx.kept)
        for chunk in _chunks(ctx.pieces, len(hidden_TD), head.weight_VD.shape[0]):
            here = slice(chunk.start, chunk.end)
            if kept is None:
                logits_CV = _chunk_logits(hidden_TD, head.weight_VD, chunk)
                logit_grad_CV = logits_CV.sub_(log_normalizer_T[here, None]).exp_().mul_(-grad_T[here, None])
            else:  # new memory: a loss may be differentiated twice
                logit_grad_CV = (
                    next(kept) * ((local_largest_T - log_normalizer_T)[here].exp_().mul_(-grad_T[here])[:, None])
                )
            logit_grad_CV.scatter_add_(1, local_TK[here], grad_TK[here] * inside_TK[here])
            _backward_chunk(logit_grad_CV.to(hidden_TD.dtype), hidden_TD, head, chunk, hidden_grad_TD)
        return (hidden_grad_TD, *[None] * (len(ctx.needs_input_grad) - 1))


def _backward_chunk(
    logit_grad_CV: Tensor,
    hidden_TD: Tensor,
    head: LmHead,
    chunk: _Chunk,
    hidden_grad_TD: Tensor | None,
) -> None:
    """Add one chunk's part to the gradients, in place."""
    if hidden_grad_TD is not None:
        hidden_grad_TD[chunk.start : chunk.end] = frozen_linear_grad(logit_grad_CV, head.weight_VD)
    for piece in chunk.pieces:
        if piece.pair is None:
            continue
        here = slice(piece.start, piece.end)
        h_ND, grad_NV = hidden_TD[here], logit_grad_CV[piece.start - chunk.start : piece.end - chunk.start]
        a_RD, b_VR = (x.to(h_ND.dtype) for x in piece.pair)
        down_grad_NR = linear_grad(grad_NV, b_VR.t())
        add_gradient_(piece.pair.b, grad_NV, linear_without_graph(h_ND, a_RD), piece.scaling)
        add_gradient_(piece.pair.a, down_grad_NR, h_ND, piece.scaling)
        if hidden_grad_TD is not None:
            add_product_(hidden_grad_TD[here], down_grad_NR, a_RD, piece.scaling)


def _local_targets(targets_TK: Tensor, head: LmHead) -> tuple[Tensor, Tensor]:
    """Targets as row numbers of this rank's part, and which of them it holds (others point at row 0)."""
    local_TK = targets_TK - head.vocab_start
    inside_TK = (local_TK >= 0) & (local_TK < head.weight_VD.shape[0])
    return torch.where(inside_TK, local_TK, 0), inside_TK


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Softmax and gradient sums are float32 at least; float64 stays, for tests against closed forms."""
    return torch.promote_types(dtype, torch.float32)
