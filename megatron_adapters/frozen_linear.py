"""x W^T with a frozen W, and its gradient by x alone.

On a CPU in float32 the product is oneDNN's instead of the BLAS torch was built with, where that is the faster one. On
an AMD EPYC with AVX-512 its 1024 x 512 x 3072 took 31.1 ms against MKL's 35.8 ms, 1024 x 1536 x 512 26.3 ms against
31.2 ms (one thread, best of 60). On an Intel Xeon (Sapphire Rapids) MKL has 16.8 ms against 18.2 ms, and 8.0 ms against
9.5 ms for the gradient of the second, so MKL trains there.

Where no gradient is wanted the weight is also laid out once as oneDNN reads it fastest: all linears of a 12 x 512
model, for the 32 rows of a decode step, took 32.5 ms against 46.1 ms (EPYC). That copy doubles the memory of the frozen
linears, on CPUs only: of all of them in a worker that samples, of the unembedding also in one that only trains, since
it writes its own backward (head.py), in which nothing is recorded. There 152,000 x 512 by 64 rows took 148 ms against
173 ms without the copy, by 440 rows 994 ms against 1013 ms (EPYC, one thread, best of 14). Everywhere else it is
F.linear.

Shapes: I inputs, O outputs; leading dimensions are free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The operator torch.compile itself emits for linears on CPUs; it has no public name.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_onednn_reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_REORDERED = "_in_onednn_layout"
"""Attribute of a frozen weight: its copy in oneDNN's layout. It goes with the weight."""
_CPU = Path("/proc/cpuinfo")
_TRAINS_BY_ONEDNN = not (_CPU.exists() and "GenuineIntel" in _CPU.read_text())
_ROWS_OF_A_STEP = 32  # the layout is chosen for about this many rows; any number is right


def frozen_linear(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, plus_O: Tensor | None = None) -> Tensor:
    """F.linear for a weight that is never trained: [..., O], dtype of x. Differentiable in x.

    plus_O: added to the result; only where no gradient is wanted.
    """
    needs_grad = torch.is_grad_enabled()
    assert plus_O is None or not needs_grad
    if not _by_onednn(x_I):
        out_O = F.linear(x_I, weight_OI, bias_O)
        return out_O if plus_O is None else out_O.add_(plus_O)
    if needs_grad:
        if x_I.requires_grad and _TRAINS_BY_ONEDNN:
            # As a matrix: oneDNN gives a view of one for more dimensions, and what a function of our own returns as a
            # view nobody may change in place, as the adapters' updates do (lora_training.py).
            out: Tensor = _FrozenLinear.apply(x_I.flatten(0, -2), weight_OI, bias_O)  # type: ignore[assignment]
            return out.view(*x_I.shape[:-1], -1)
        return frozen_product(x_I, weight_OI, bias_O)
    weight_OI = _reorder(weight_OI)
    if plus_O is None:
        return _product(x_I, weight_OI, bias_O)
    assert _onednn_linear is not None
    return _onednn_linear.binary(x_I.contiguous(), plus_O.contiguous(), weight_OI, bias_O, "add")


def frozen_product(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """What frozen_linear computes where a gradient is wanted, for functions that write their own backward."""
    if _TRAINS_BY_ONEDNN and _by_onednn(x_I):
        return _product(x_I, weight_OI, bias_O)
    return F.linear(x_I, weight_OI, bias_O)


def frozen_linear_grad(grad_O: Tensor, weight_OI: Tensor) -> Tensor:
    """The gradient by x: grad W, [..., I]."""
    if _TRAINS_BY_ONEDNN and _by_onednn(grad_O):
        return _product(grad_O, weight_OI.t(), None)
    return grad_O @ weight_OI


def _by_onednn(x: Tensor) -> bool:
    return _onednn_linear is not None and x.device.type == "cpu" and x.dtype == torch.float32


def _product(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    assert _onednn_linear is not None
    return _onednn_linear(x_I.contiguous(), weight_OI, bias_O, "none", [], "")


def _reorder(weight_OI: Tensor) -> Tensor:
    known: Tensor | None = getattr(weight_OI, _REORDERED, None)
    if known is not None:
        return known
    reordered = weight_OI if _onednn_reorder is None else _onednn_reorder(weight_OI.detach(), _ROWS_OF_A_STEP)
    setattr(weight_OI, _REORDERED, reordered)
    return reordered


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.weight_OI = weight_OI  # frozen, so it needs no watching by save_for_backward
        return frozen_product(x_I, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return frozen_linear_grad(grad_outputs[0], ctx.weight_OI), None, None
