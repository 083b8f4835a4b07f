"""LoRA of several adapters in one fused linear by grouped products: a few kernels, however many adapters there are.

lora_training.py's loop starts a dozen small kernels for every adapter in every linear, which on a GPU costs more than
what they compute: so on CUDA in half precision, where torch has grouped_mm as one kernel (grouped.py), a batch of
several adapters goes this way. Ranks are padded with zeros to the largest one; matrices that lie apart, in float32, are
copied together in the compute dtype for each product and not kept. The numbers are the loop's, up to roundings of the
dtype.

Shapes: T tokens, I inputs, O outputs of a projection, G groups of consecutive tokens, P paths, R the padded rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped import ALIGNMENT, trains_by_kernel
from .lora_stack import Split, Stack, gradient_of


class Group(NamedTuple):
    """The tokens before `end` that no earlier group has; without a stack nothing is added to them."""

    end: int
    stack: Stack | None


class Plan(NamedTuple):
    """How the tokens of one linear are grouped."""

    groups: tuple[Group, ...]
    num_paths: int
    rank: int
    """R"""
    ends_G: Tensor
    """int32"""
    scaling_T1: Tensor
    """alpha / rank of each token's adapter, float32"""

    def having(self, place: int) -> list[tuple[int, Stack, int]]:
        """Groups that adapt a path: their number, their stack, and where among its own projections the path is."""
        return [
            (number, group.stack, group.stack.places.index(place))
            for number, group in enumerate(self.groups)
            if group.stack is not None and place in group.stack.places
        ]


def is_better(x_TI: Tensor, weight_OI: Tensor, num_parts: int) -> bool:
    """Whether the updates of as many adapters beside this weight are grouped."""
    return trains_by_kernel(x_TI) and num_parts > 1 and all(size % ALIGNMENT == 0 for size in weight_OI.shape)


def make_plan(parts: Sequence[tuple[int, int, Stack]], num_paths: int, x_TI: Tensor) -> Plan:
    """parts: start, end and stack, ascending; the tokens between them have no adapter."""
    groups: list[Group] = []
    position, num_tokens = 0, x_TI.shape[0]
    for start, end, stack in parts:
        if start > position:
            groups.append(Group(start, None))
        groups.append(Group(end, stack))
        position = end
    if position < num_tokens:
        groups.append(Group(num_tokens, None))
    ends = tuple(group.end for group in groups)
    scalings = tuple(1.0 if group.stack is None else group.stack.scaling for group in groups)
    rank = _aligned(max(stack.rank for _, _, stack in parts))
    return Plan(tuple(groups), num_paths, rank, *_on_device(ends, scalings, x_TI.device))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@lru_cache(maxsize=16)
def _on_device(ends: tuple[int, ...], scalings: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """ends_G and scaling_T1: equal in all linears of a forward, so they are sent once."""
    lengths = torch.tensor(ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
    scaling_T1 = torch.tensor(scalings).repeat_interleave(lengths)[:, None]
    return torch.tensor(ends, dtype=torch.int32).to(device), scaling_T1.to(device)


class Updates(torch.autograd.Function):
    """out + the updates of all groups; `out` [T, O] itself, changed in place. Differentiable in out and x; the
    gradients of A and B are added to what they have (`.grad`) in the backward. `split`: see lora_stack.py.
    """

    @staticmethod
    def forward(ctx: Any, out_TO: Tensor, x_TI: Tensor, plan: Plan, split: Split, *matrices: Tensor) -> Tensor:
        ctx.mark_dirty(out_TO)
        h_TW = _scaled(_grouped(x_TI, _all_a(plan, x_TI).transpose(1, 2), plan), plan)
        for place, out in enumerate(split(out_TO)):
            b_GOR = _all_b(plan, place, x_TI)
            if b_GOR is not None:
                update = _grouped(_columns(h_TW, place, plan), b_GOR.transpose(1, 2), plan)
                out.add_(update.view_as(out))
        ctx.plan, ctx.split = plan, split
        ctx.save_for_backward(x_TI, h_TW)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, h_TW = ctx.saved_tensors
        plan: Plan = ctx.plan
        h_grad_TW = torch.zeros_like(h_TW)
        for place, grad in enumerate(ctx.split(grads[0])):
            b_GOR = _all_b(plan, place, x_TI)
            if b_GOR is None:
                continue
            grad_TO = grad.flatten(1).contiguous()
            _columns(h_grad_TW, place, plan).copy_(_grouped(grad_TO, b_GOR, plan))
            b_grads_GRO = _grouped(_columns(h_TW, place, plan).t(), grad_TO, plan)
            for number, stack, own in plan.having(place):
                if stack.b_OR[own].requires_grad:
                    gradient_of(stack.b_OR[own]).add_(b_grads_GRO[number, : stack.rank].t())
        h_grad_TW = _scaled(h_grad_TW, plan)
        a_grads_GWI = _grouped(h_grad_TW.t(), x_TI, plan)
        for place in range(plan.num_paths):
            first = place * plan.rank
            for number, stack, own in plan.having(place):
                if stack.a_RI[own].requires_grad:
                    gradient_of(stack.a_RI[own]).add_(a_grads_GWI[number, first : first + stack.rank])
        x_grad_TI = None
        if ctx.needs_input_grad[1]:
            x_grad_TI = _grouped(h_grad_TW, _all_a(plan, x_TI), plan)
        return (grads[0], x_grad_TI, *[None] * (len(ctx.needs_input_grad) - 2))


def _grouped(left: Tensor, right: Tensor, plan: Plan) -> Tensor:
    """[T, I] by each group's own of [G, I, O]: [T, O]. Or each group's part of [R, T] by that of [T, O]: [G, R, O]."""
    return F.grouped_mm(left, right, offs=plan.ends_G)


def _columns(h_TW: Tensor, place: int, plan: Plan) -> Tensor:
    return h_TW[:, place * plan.rank : (place + 1) * plan.rank]


def _scaled(h_TW: Tensor, plan: Plan) -> Tensor:
    return (h_TW * plan.scaling_T1).to(h_TW.dtype)


def _all_a(plan: Plan, like: Tensor) -> Tensor:
    """[G, P * R, I]"""
    a_GPRI = like.new_zeros(len(plan.groups), plan.num_paths, plan.rank, like.shape[1])
    into, values = [], []
    for place in range(plan.num_paths):
        for number, stack, own in plan.having(place):
            into.append(a_GPRI[number, place, : stack.rank])
            values.append(stack.a_RI[own].detach())
    torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateImportUsage]
    return a_GPRI.flatten(1, 2)


def _all_b(plan: Plan, place: int, like: Tensor) -> Tensor | None:
    """[G, O, R]; None where no group adapts this path."""
    having = plan.having(place)
    if not having:
        return None
    _, first, own = having[0]
    b_GOR = like.new_zeros(len(plan.groups), first.b_OR[own].shape[0], plan.rank)
    into = [b_GOR[number, :, : stack.rank] for number, stack, _ in having]
    values = [stack.b_OR[own].detach() for _, stack, own in having]
    torch._foreach_copy_(into, values)  # pyright: ignore[reportPrivateImportUsage]
    return b_GOR
