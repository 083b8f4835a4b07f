"""An uploaded loss, built from the list of allowed operations and run on the logprobs of a pass.

On the CPU, whatever the model runs on: a loss is a few dozen tiny operations a datum, which the CPU does faster than a
GPU is asked to, and no index of a user's can end the worker in a device-side assertion. The whole pass is one forward
and one backward: each datum's loss is differentiated by its logprobs here and now (so that its graph's memory is that
of one datum), and the model goes back from these gradients.

What a datum's loss may take is bounded before each operation (custom_loss_bounds.py).
T packed tokens, K targets a token.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adapters.interface import Datum
from tinker_hpc import custom_loss
from tinker_hpc.custom_loss import CustomLoss, Device, Dtype, Ref
from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record
from tinker_hpc.worker.batch import custom_inputs
from tinker_hpc.worker.custom_loss_bounds import Budget, NotAllowed, tensors_in

_WHAT_OPERATIONS_RAISE = (
    RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, MemoryError, NotImplementedError,
)  # fmt: skip

DATUM_INDEX = "datum_index"
"""The engine's loss input that says which datum a token belongs to: int64 [T]."""


def numbered(data: Sequence[Datum]) -> list[Datum]:
    """The data of a request, each token saying which datum it belongs to: micro-batches mix them."""
    return [
        replace(datum, inputs={**datum.inputs, DATUM_INDEX: np.full(len(datum.tokens), index)})
        for index, datum in enumerate(data)
    ]


class CustomLossFn:
    """The loss of one request, as the engine calls it.

    data: of each datum of the request, the tensors the loss takes after logprobs.
    """

    def __init__(self, loss: CustomLoss, data: Sequence[Sequence[Tensor]]) -> None:
        self._loss = loss
        self._data = data
        self._functions = [_find(step.operation.path) for step in loss.steps]

    @classmethod
    def of(cls, request: Record) -> CustomLossFn:
        """The loss of a forward_backward record with a `custom_loss`.

        Raises: RequestError for a graph that is not allowed, or inputs that do not fit together.
        """
        loss = custom_loss.read(request.header["custom_loss"])
        inputs = custom_inputs(request, loss.inputs[1:])
        return cls(loss, [[torch.from_numpy(x) for x in row] for row in inputs])

    def __call__(self, logprobs: Tensor, inputs: Mapping[str, Tensor], segment_ids_T: Tensor) -> Tensor:
        """The loss, summed over the datums of a micro-batch, a scalar.

        Raises: RequestError naming datum and node, for whatever an operation raises, a loss that is no scalar or does
            not depend on logprobs, a gradient that is not finite, and results beyond the limits above.
        """
        lengths = torch.unique_consecutive(segment_ids_T, return_counts=True)[1].tolist()
        starts = torch.tensor([0, *lengths[:-1]], dtype=torch.int64).cumsum(0)
        indices = inputs[DATUM_INDEX].cpu()[starts].tolist()
        backward = logprobs.requires_grad
        total = 0.0
        grads: list[Tensor] = []
        for index, piece in zip(indices, logprobs.detach().cpu().split(lengths), strict=True):
            leaf = piece.clone().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                loss, _ = self._evaluate(leaf, index)
            if backward:
                grads.append(self._gradient(loss, leaf, index))
            total += loss.item()
        value = torch.tensor(total, dtype=logprobs.dtype, device=logprobs.device)
        if not backward:
            return value
        surrogate = (logprobs * torch.cat(grads).to(logprobs.device)).sum()
        return value + (surrogate - surrogate.detach())  # the second is zero, with the gradient

    @torch.no_grad()
    def metrics(self, logprobs: Sequence[np.ndarray]) -> dict[str, float]:
        """The metrics of the whole pass, from its logprobs, one array per datum: sums, or means over the datums.

        Run once more here, where every rank has all logprobs, instead of being carried through the ranks beside the
        loss: it is a few operations a datum, and only where the graph has metrics.
        """
        if not self._loss.metrics:
            return {}
        rows = [self._evaluate(torch.from_numpy(row.copy()), index)[1] for index, row in enumerate(logprobs)]
        sums = np.sum(np.asarray(rows, dtype=np.float64), axis=0).tolist()
        return {
            key: value / len(rows) if key.endswith(":mean") else value
            for key, value in zip(self._loss.metrics, sums, strict=True)
        }

    def _evaluate(self, logprobs: Tensor, index: int) -> tuple[Tensor, list[float]]:
        """Loss (a scalar) and metrics of one datum."""
        where = f"custom loss {self._loss.name!r} on data[{index}]"
        results: dict[str, Any] = dict(zip(self._loss.placeholders, (logprobs, *self._data[index]), strict=True))
        budget = Budget()
        for step, function in zip(self._loss.steps, self._functions, strict=True):
            args, kwargs = (_resolved(x, results) for x in (step.args, dict(step.kwargs)))
            try:
                results[step.node] = budget.run(step, function, args, kwargs)
            except NotAllowed as error:
                raise RequestError(f"{where}, node {step.node!r} ({step.operation.path}): {error}.") from None
            except _WHAT_OPERATIONS_RAISE as error:
                shapes = ", ".join(str(list(x.shape)) for x in tensors_in((args, kwargs))) or "none"
                said = str(error).partition("\n")[0]
                raise RequestError(
                    f"{where}, node {step.node!r} ({step.operation.path}): {said}. Shapes of its tensors: {shapes}."
                ) from error
        loss = results[self._loss.loss]
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise RequestError(f"{where}: it must return a scalar loss, got {shape}. Sum it: loss.sum().")
        metrics = []
        for name, node in self._loss.metrics.items():
            value = results[node]
            if isinstance(value, Tensor) and value.numel() != 1:
                raise RequestError(f"{where}: metric {name!r} has shape {list(value.shape)}, expected a scalar.")
            if not isinstance(value, Tensor | int | float):
                raise RequestError(f"{where}: metric {name!r} is a {type(value).__name__}, expected a scalar.")
            metrics.append(float(value.detach() if isinstance(value, Tensor) else value))
        return loss, metrics

    def _gradient(self, loss: Tensor, logprobs: Tensor, index: int) -> Tensor:
        where = f"custom loss {self._loss.name!r} on data[{index}]"
        if not loss.requires_grad:
            raise RequestError(f"{where}: the loss does not depend on logprobs. Is there a detach() too many?")
        try:
            (grad,) = torch.autograd.grad(loss, logprobs, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            said = str(error).partition("\n")[0]
            raise RequestError(f"{where}: its gradient cannot be computed: {said}.") from error
        if grad is None:
            raise RequestError(f"{where}: the loss does not depend on logprobs. Is there a detach() too many?")
        bad = ~grad.isfinite()
        if bad.any():
            raise RequestError(
                f"{where}: the gradient by logprobs{bad.nonzero()[0].tolist()} is {grad[bad][0].item()}; nothing was "
                "added. Look for log(0), 0/0 or an overflowing exp, also in the branch a where() does not take."
            )
        return grad


def _find(path: str) -> Callable[..., Any]:
    """The function of an allowed path; paths come from custom_loss_ops.py alone."""
    first, *rest = path.split(".")
    found: Any = {"torch": torch, "operator": operator, "math": math, "Tensor": Tensor, "getattr": getattr}[first]
    for name in rest:
        found = getattr(found, name)
    return found


def _resolved(value: Any, results: Mapping[str, Any]) -> Any:
    """An argument with results in place of references."""
    match value:
        case Ref():
            return results[value.node]
        case Dtype():
            return getattr(torch, value.name)
        case Device():
            return torch.device("cpu")
        case slice():
            return slice(*(_resolved(x, results) for x in (value.start, value.stop, value.step)))
        case tuple() | list():
            return type(value)(_resolved(x, results) for x in value)
        case dict():
            return {key: _resolved(x, results) for key, x in value.items()}
        case _:
            return value
