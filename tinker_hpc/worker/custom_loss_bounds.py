"""What an operation of an uploaded loss may take: found out before it runs, from the shapes it is given.

The operations are on a list (custom_loss_ops.py); what they are called with is the user's. So each call is judged here
before torch sees it: how many elements its result can have, how many it reads or multiplies, and that nothing but
tensors and numbers comes where Python would do something of its own with it (a tuple times a number is a longer tuple).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinker_hpc.custom_loss import Step
from tinker_hpc.custom_loss_ops import Growth

MAX_ELEMENTS = 2**24
"""Of one operation's result: 64 MiB of float32, or 4,096 tokens each with each."""
MAX_TOTAL = 2**26
"""Of all results of one datum's loss, which its backward keeps."""
MAX_WORK = 2**30
"""Elements read, and multiplications of matrix products, of one datum's loss: some seconds of one core."""
MAX_PIECES = 4096
LEAST_ELEMENTS = 1024
"""A tensor counts as at least so many: its Python object and its place in the graph are not free."""


class NotAllowed(Exception):
    """What an operation was asked for is beyond the limits."""


@dataclass
class Budget:
    """What the loss of one datum has taken so far, in elements."""

    kept: int = 0
    work: int = 0

    def run(self, step: Step, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operation's result. Raises: NotAllowed; whatever the operation raises."""
        path, growth = step.operation.path, step.operation.growth
        tensors = list(tensors_in((args, kwargs)))
        if path == "getattr":
            return _attribute(*args)
        if path.startswith("Tensor.") and not isinstance(args[0], Tensor):
            raise NotAllowed(f"a method of tensors, called on a {type(args[0]).__name__}")
        if path == "operator.getitem" and args and isinstance(args[0], tuple):
            return _item(args, kwargs)
        if not tensors and growth is not Growth.SIZED:
            return _on_numbers(path, function, args, kwargs)
        _check_arguments(path, growth, args, kwargs, tensors)
        elements = _bound(path, growth, args, kwargs, tensors)
        if elements > MAX_ELEMENTS:
            raise NotAllowed(
                f"its result could have {elements} elements, at most {MAX_ELEMENTS} are computed. Send shorter "
                "sequences, or sum before you multiply"
            )
        self.work += sum(x.numel() for x in tensors) if growth is not Growth.PRODUCT else _multiplications(tensors)
        if self.work > MAX_WORK:
            raise NotAllowed(
                f"the loss of this datum reads or multiplies more than {MAX_WORK} elements. Send shorter sequences, "
                "or compute with less at a time"
            )
        result = function(*args, **kwargs)
        self.kept += sum(max(x.numel(), LEAST_ELEMENTS) for x in tensors_in(result))
        if self.kept > MAX_TOTAL:
            raise NotAllowed(
                f"the results of this datum have more than {MAX_TOTAL} elements in all. Send shorter sequences, or "
                "compute with less at a time"
            )
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dictionaries and slices."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))


def _attribute(of: Any, name: str) -> Any:
    if not isinstance(of, Tensor) and not (isinstance(of, tuple) and name in ("values", "indices")):
        raise NotAllowed(f"{name} of a {type(of).__name__}; attributes are those of tensors")
    return getattr(of, name)


def _item(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One of the sizes of a shape, or of the tensors that chunk, unbind, topk or max(dim=...) return."""
    if kwargs or len(args) != 2 or isinstance(args[1], bool) or not isinstance(args[1], int | slice):
        raise NotAllowed("the index of a tuple is a number")
    return args[0][args[1]]


def _check_arguments(
    path: str, growth: Growth, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
) -> None:
    if growth is Growth.NUMBER:
        raise NotAllowed("math works on numbers; use the function of the same name in torch")
    if growth in (Growth.INDEX, Growth.PRODUCT) and any(True for _ in tensors_in(kwargs)):
        raise NotAllowed("give it its tensors by position")
    if growth is Growth.BROADCAST and any(isinstance(x, tuple | list) for x in (*args, *kwargs.values())):
        raise NotAllowed("it takes tensors and numbers, not a tuple or list of them; use torch.stack")
    if path.endswith(("unbind", "split", "chunk")) and max(args[0].shape, default=0) > MAX_PIECES:
        raise NotAllowed(f"tensors of more than {MAX_PIECES} rows are not taken apart; use an index or a sum")
    if path.endswith(".where") and len(tensors) == len(args) == 1:
        raise NotAllowed("where() takes a condition and two values")


def _on_numbers(path: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Sizes and factors: Python's own arithmetic, kept small."""
    if kwargs or not path.startswith(("operator.", "math.")) or not all(isinstance(x, int | float) for x in args):
        given = ", ".join(type(x).__name__ for x in (*args, *kwargs.values())) or "nothing"
        raise NotAllowed(f"it needs a tensor; given: {given}")
    if path == "operator.pow" and abs(args[1]) > 64:
        raise NotAllowed(f"a power of {args[1]} of a number")
    result = function(*args)
    if isinstance(result, complex) or abs(result) > 2**62:
        raise NotAllowed("the number it gives is too large")
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
            return max(_span(x) for x in tensors)


def _span(tensor: Tensor) -> int:
    """Elements, were no dimension empty: the sum of [0, N] over its first has N."""
    return math.prod(max(1, size) for size in tensor.shape)


def _broadcast_elements(tensors: Sequence[Tensor]) -> int:
    largest = max(tensors, key=Tensor.numel)
    if all(x.shape == largest.shape or x.numel() == 1 for x in tensors):
        return largest.numel()
    width = max(x.ndim for x in tensors)
    padded = [(1,) * (width - x.ndim) + tuple(x.shape) for x in tensors]
    return math.prod(max(sizes) for sizes in zip(*padded, strict=True))


def _product_elements(path: str, tensors: Sequence[Tensor]) -> int:
    if len(tensors) != 2 or any(x.ndim > 2 for x in tensors):
        raise NotAllowed("products are of two tensors of one or two dimensions")
    a, b = tensors
    if path.endswith("outer"):
        return a.numel() * b.numel()
    return (a.shape[0] if a.ndim == 2 else 1) * (b.shape[1] if b.ndim == 2 else 1)


def _multiplications(tensors: Sequence[Tensor]) -> int:
    a, b = tensors
    return a.numel() * (b.shape[1] if b.ndim == 2 else 1)


def _indexed_elements(path: str, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> int:
    """For each place of the index tensors: what is left of the tensor without its (smallest) indexed dimensions."""
    of, *indices = tensors
    if path.endswith("getitem"):
        if not isinstance(args[0], Tensor) or len(args) != 2:
            raise NotAllowed("what is indexed is a tensor, or a tuple by a number")
        if any(
            isinstance(x, list) or (isinstance(x, slice) and any(True for _ in tensors_in(x)))
            for x in (args[1], *_flat(args[1]))
        ):
            raise NotAllowed("index with numbers, slices or tensors")
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
    positional = args[:1] if path == "torch.full" else args[1:] if path.startswith("Tensor.") else args
    numbers = [size for each in (*positional, kwargs.get("size", ())) for size in _flat(each)]
    if not all(isinstance(size, int) for size in numbers):
        raise NotAllowed("sizes are whole numbers")
    product = math.prod(max(1, size) for size in numbers)
    keeps = path == "Tensor.repeat" or any(size < 0 for size in numbers)
    return product * _span(args[0]) if keeps and args and isinstance(args[0], Tensor) else product


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]
