"""An uploaded loss, built from the list of allowed operations and run on the logprobs of a pass.

On the CPU, whatever the model runs on: a loss is a few dozen tiny operations a datum, which the CPU does faster than a
GPU is asked to, and no index of a user's can end the worker in a device-side assertion. The whole pass is one forward
and one backward: each datum's loss is differentiated by its logprobs here and now (so that its graph's memory is that
of one datum), and the model goes back from these gradients.

What a datum's loss may allocate is bounded before each operation. T packed tokens, K targets a token.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adapters.interface import Datum
from tinker_hpc import custom_loss
from tinker_hpc.custom_loss import CustomLoss, Device, Dtype, Ref, Step
from tinker_hpc.custom_loss_ops import Growth
from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record
from tinker_hpc.worker.batch import custom_inputs

MAX_ELEMENTS = 2**24
"""Of one operation's result: 64 MiB of float32, or 4,096 tokens each with each."""
MAX_TOTAL = 2**26
"""Of all results of one datum's loss, which its backward keeps."""

MAX_PIECES = 4096

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
        total = 0
        for step, function in zip(self._loss.steps, self._functions, strict=True):
            args, kwargs = (_resolved(x, results) for x in (step.args, dict(step.kwargs)))
            try:
                result = _apply(step, function, args, kwargs)
            except _NotAllowed as error:
                raise RequestError(f"{where}, node {step.node!r} ({step.operation.path}): {error}") from None
            except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError, NotImplementedError) as error:
                shapes = ", ".join(str(list(x.shape)) for x in _tensors((args, kwargs))) or "none"
                said = str(error).partition("\n")[0]
                raise RequestError(
                    f"{where}, node {step.node!r} ({step.operation.path}): {said}. Shapes of its tensors: {shapes}."
                ) from error
            results[step.node] = result
            total += sum(x.numel() for x in _tensors(result))
            if total > MAX_TOTAL:
                raise RequestError(
                    f"{where}, node {step.node!r}: the results of this datum have more than {MAX_TOTAL} elements in "
                    "all. Send shorter sequences, or compute with less at a time."
                )
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
        (grad,) = torch.autograd.grad(loss, logprobs, allow_unused=True)
        if grad is None:
            raise RequestError(f"{where}: the loss does not depend on logprobs. Is there a detach() too many?")
        bad = ~grad.isfinite()
        if bad.any():
            raise RequestError(
                f"{where}: the gradient by logprobs{bad.nonzero()[0].tolist()} is {grad[bad][0].item()}; nothing was "
                "added. Look for log(0), 0/0 or an overflowing exp, also in the branch a where() does not take."
            )
        return grad


class _NotAllowed(Exception):
    """What an operation was asked for is beyond the limits."""


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


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dictionaries and slices."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))


def _apply(step: Step, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation, after its result was found to be small enough."""
    path, growth = step.operation.path, step.operation.growth
    tensors = list(_tensors((args, kwargs)))
    if path == "getattr":
        if not isinstance(args[0], Tensor) and not (isinstance(args[0], tuple) and args[1] in ("values", "indices")):
            raise _NotAllowed(f"{args[1]} of a {type(args[0]).__name__}; attributes are those of tensors")
        return getattr(*args)
    if path.startswith("Tensor.") and not isinstance(args[0], Tensor):
        raise _NotAllowed(f"a method of tensors, called on a {type(args[0]).__name__}")
    if not tensors and growth is not Growth.SIZED:
        return _on_numbers(path, function, args, kwargs)
    if growth is Growth.NUMBER:
        raise _NotAllowed("math works on numbers; use the function of the same name in torch")
    if growth in (Growth.INDEX, Growth.PRODUCT) and any(True for _ in _tensors(kwargs)):
        raise _NotAllowed("give it its tensors by position")
    if path.endswith(("unbind", "split", "chunk")) and max(args[0].shape, default=0) > MAX_PIECES:
        raise _NotAllowed(f"tensors of more than {MAX_PIECES} rows are not taken apart; use an index or a sum")
    if path.endswith(".where") and len(tensors) == len(args) == 1:
        raise _NotAllowed("where() takes a condition and two values")
    elements = _bound(path, growth, args, kwargs, tensors)
    if elements > MAX_ELEMENTS:
        raise _NotAllowed(
            f"its result could have {elements} elements, at most {MAX_ELEMENTS} are computed. Send shorter sequences, "
            "or sum before you multiply."
        )
    return function(*args, **kwargs)


def _on_numbers(path: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sizes and factors: Python's own arithmetic, kept small."""
    if path == "operator.getitem" and isinstance(args[0], tuple) and isinstance(args[1], int | slice):
        return args[0][args[1]]
    if kwargs or not path.startswith(("operator.", "math.")) or not all(isinstance(x, int | float) for x in args):
        given = ", ".join(type(x).__name__ for x in (*args, *kwargs.values())) or "nothing"
        raise _NotAllowed(f"it needs a tensor; given: {given}")
    if path == "operator.pow" and abs(args[1]) > 64:
        raise _NotAllowed(f"a power of {args[1]} of a number")
    result = function(*args)
    if isinstance(result, complex) or abs(result) > 2**62:
        raise _NotAllowed("the number it gives is too large")
    return result


def _bound(
    path: str, growth: Growth, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
) -> int:
    """At most this many elements will the result have."""
    match growth:
        case Growth.BROADCAST:
            return _broadcast_elements(tensors)
        case Growth.JOIN:
            return sum(x.numel() for x in tensors)
        case Growth.PRODUCT:
            return _product_elements(path, tensors)
        case Growth.INDEX:
            return _indexed_elements(path, args, tensors)
        case Growth.SIZED:
            return _sized_elements(path, args, kwargs)
        case Growth.NONE | Growth.NUMBER:
            return max(x.numel() for x in tensors)


def _broadcast_elements(tensors: Sequence[Tensor]) -> int:
    largest = max(tensors, key=Tensor.numel)
    if all(x.shape == largest.shape or x.numel() == 1 for x in tensors):
        return largest.numel()
    width = max(x.ndim for x in tensors)
    padded = [(1,) * (width - x.ndim) + tuple(x.shape) for x in tensors]
    return math.prod(max(sizes) for sizes in zip(*padded, strict=True))


def _product_elements(path: str, tensors: Sequence[Tensor]) -> int:
    if len(tensors) != 2 or any(x.ndim > 2 for x in tensors):
        raise _NotAllowed("products are of two tensors of one or two dimensions")
    a, b = tensors
    if path.endswith("outer"):
        return a.numel() * b.numel()
    return (a.shape[0] if a.ndim == 2 else 1) * (b.shape[1] if b.ndim == 2 else 1)


def _indexed_elements(path: str, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> int:
    """For each place of the index tensors: what is left of the tensor without its (smallest) indexed dimensions."""
    of, *indices = tensors
    if path.endswith("getitem") and not isinstance(args[0], Tensor):
        raise _NotAllowed("the index of a tuple is a number")
    if path.endswith("getitem") and any(isinstance(x, list) for x in (args[1], *_flat(args[1]))):
        raise _NotAllowed("index with numbers, slices or tensors")
    picking = [x for x in indices if x.dtype is not torch.bool]
    if not picking:
        return of.numel()
    if path.endswith("gather"):
        return picking[0].numel()
    if path.endswith("take_along_dim"):
        return _broadcast_elements(tensors)
    smallest = sorted(of.shape)[: len(picking)]
    return _broadcast_elements(picking) * (of.numel() // max(1, math.prod(smallest)))


def _sized_elements(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if path == "torch.arange":
        bounds = [kwargs.get(key) for key in ("start", "end", "step")]
        for number, value in zip(([1], [0, 1], [0, 1, 2])[len(args) - 1] if args else [], args, strict=False):
            bounds[number] = value
        start, end, step = (default if x is None else x for x, default in zip(bounds, (0, 0, 1), strict=True))
        return math.ceil(abs((end - start) / step)) if step else 0
    sizes = kwargs.get("size", args[:1] if path == "torch.full" else args[1:] if path.startswith("Tensor.") else args)
    numbers = [size for each in (sizes if isinstance(sizes, tuple | list) else (sizes,)) for size in _flat(each)]
    if not all(isinstance(size, int) for size in numbers):
        raise _NotAllowed("sizes are whole numbers")
    product = math.prod(size for size in numbers if size >= 0)
    keeps = path == "Tensor.repeat" or any(size < 0 for size in numbers)
    return product * args[0].numel() if keeps and args and isinstance(args[0], Tensor) else product


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]
