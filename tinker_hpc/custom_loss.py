"""An uploaded loss: the SDK's traced graph as plain data, checked. No code is in it and none is made of it here.

The SDK traces the user's function with torch.fx and sends its nodes as JSON (tinker.types.CustomLossGraph, format 1).
This module reads them into `CustomLoss` or says in words what is not allowed; the gateway does so when a loss is
uploaded, the worker once more before it builds anything (`worker/custom_loss.py`). Pure.

The function runs once per datum, on the logprobs of that datum's targets and on the loss_fn_inputs it names, and the
losses are summed: so a batch may be cut into micro-batches and over data-parallel ranks like that of any other loss.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tinker_hpc.custom_loss_ops import ATTRIBUTES, DEFAULTS, DTYPES, FUNCTIONS, KEYWORDS, METHODS, TEXTS, Operation
from tinker_hpc.errors import RequestError

MAX_NODES = 512
MAX_INPUTS = 16
MAX_BYTES = 256 * 2**10
"""Of the graph as JSON; a graph of MAX_NODES ordinary nodes has half of it."""
MAX_ITEMS = 64
"""Of a list, tuple or dictionary in an argument."""
MAX_DEPTH = 6
MAX_INTEGER = 2**31
"""Sizes, positions and factors; a larger constant is a mistake or worse."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")


@dataclass(frozen=True)
class Ref:
    """The result of an earlier node."""

    node: str


@dataclass(frozen=True)
class Dtype:
    """A torch dtype by name."""

    name: str


@dataclass(frozen=True)
class Device:
    """Some device; the worker has only the one its logprobs are on."""


@dataclass(frozen=True)
class Step:
    """One operation: its arguments are numbers, None, strings of TEXTS, Ref, Dtype, Device, slices, and tuples, lists
    and dictionaries of these."""

    node: str
    operation: Operation
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class CustomLoss:
    """A loss that may be built.

    inputs: (name, rank) in the order the function takes them, logprobs first.
    placeholders: node of each input.
    loss, metrics: nodes of the scalar loss and of each metric ("custom/<name>:sum" or ":mean").
    """

    name: str
    inputs: tuple[tuple[str, int], ...]
    placeholders: tuple[str, ...]
    steps: tuple[Step, ...]
    loss: str
    metrics: Mapping[str, str]


def read(payload: Mapping[str, Any]) -> CustomLoss:
    """The loss in a create_custom_loss body, or in the `custom_loss` field of a logged request.

    Raises: RequestError naming the node and what is not allowed.
    """
    name = payload.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 128:
        raise RequestError(f"a custom loss needs a name of at most 128 letters; given: {str(name)[:150]!r}.")
    return _Reader(name).read(payload)


def stored(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make a loss, without who uploaded it."""
    return {key: payload.get(key) for key in ("name", "inputs", "graph")}


def loss_id(payload: Mapping[str, Any]) -> str:
    """Named after its content: the same loss has the same id in another session, or after a restart."""
    text = json.dumps(stored(payload), sort_keys=True, separators=(",", ":"))
    return f"loss-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class _Reader:
    """Reads one graph; remembers which nodes exist so far."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: set[str] = set()
        self._where = "the graph"

    def read(self, payload: Mapping[str, Any]) -> CustomLoss:
        nodes = self._nodes(payload)
        inputs = self._inputs(payload.get("inputs"))
        placeholders: list[tuple[str, str]] = []
        steps: list[Step] = []
        for index, node in enumerate(nodes):
            op, node_name, target = (self._text(node, key, index) for key in ("op", "name", "target"))
            self._where = f"node {node_name[:64]!r}"
            if not _NAME.fullmatch(node_name) or node_name in self._known:
                self._refuse("its name is not one of letters, digits and underscores that no other node has")
            if op == "output":
                if index != len(nodes) - 1:
                    self._refuse("an output is the last node")
                loss, metrics = self._output(node.get("args"))
                self._check_placeholders(inputs, [target for _, target in placeholders])
                found = tuple(placeholder for placeholder, _ in placeholders)
                return CustomLoss(self._name, inputs, found, tuple(steps), loss, metrics)
            if op == "placeholder":
                placeholders.append((node_name, target))
                if node.get("args") or node.get("kwargs"):
                    self._refuse("an input has no default")
            else:
                steps.append(self._step(op, node_name, target, node))
            self._known.add(node_name)
        self._refuse("there is no output node")

    def _refuse(self, what: str) -> NoReturn:
        raise RequestError(
            f"custom loss {self._name!r}, {self._where}: {what}. A custom loss is arithmetic on its inputs with "
            "torch, math and operators. For anything else pass the function itself to "
            "forward_backward_custom(data, fn): it then runs beside your loop."
        )

    def _nodes(self, payload: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        graph = payload.get("graph")
        if not isinstance(graph, Mapping) or graph.get("format", 1) != 1 or not isinstance(graph.get("nodes"), list):
            self._refuse('it must be {"format": 1, "nodes": [...]}, as tinker 0.36 and newer send it')
        nodes: list[Any] = graph["nodes"]
        if len(nodes) > MAX_NODES:
            self._refuse(f"it has {len(nodes)} nodes, at most {MAX_NODES} are taken")
        try:
            size = len(json.dumps(nodes))
        except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
            self._refuse("it has a giant constant; large constants belong in loss_fn_inputs")
        if size > MAX_BYTES:
            self._refuse(
                f"it has {size} bytes, at most {MAX_BYTES} are taken; large constants belong in loss_fn_inputs"
            )
        if not all(isinstance(node, Mapping) for node in nodes):
            self._refuse("its nodes must be objects")
        return nodes

    def _inputs(self, inputs: Any) -> tuple[tuple[str, int], ...]:
        self._where = "the inputs"
        if not isinstance(inputs, list) or not 1 <= len(inputs) <= MAX_INPUTS:
            self._refuse(f"there must be 1 to {MAX_INPUTS} of them, logprobs first")
        read: list[tuple[str, int]] = []
        for each in inputs:
            name, rank = (each.get("name"), each.get("rank")) if isinstance(each, Mapping) else (None, None)
            if not isinstance(name, str) or not _INPUT.fullmatch(name):
                self._refuse(f"{str(name)[:64]!r} is no name of lowercase letters, digits and underscores")
            if type(rank) is not int or not 0 <= rank <= 2:
                self._refuse(f"{name} has rank {str(rank)[:20]}; a rank is 0 (a number), 1 ([T]) or 2 ([T, K])")
            read.append((name, rank))
        if read[0][0] != "logprobs" or read[0][1] == 0 or len({name for name, _ in read}) != len(read):
            self._refuse("the first must be logprobs, of rank 1 or 2, and no name may come twice")
        return tuple(read)

    def _check_placeholders(self, inputs: Sequence[tuple[str, int]], targets: Sequence[str]) -> None:
        names = [name for name, _ in inputs]
        if targets != names:
            self._refuse(f"the graph takes {', '.join(targets)[:200]}; the declared inputs are {', '.join(names)}")

    def _text(self, node: Mapping[str, Any], key: str, index: int) -> str:
        value = node.get(key)
        if not isinstance(value, str) or len(value) > 256:
            self._where = f"node {index}"
            self._refuse(f"its {key} must be a short text")
        return value

    def _step(self, op: str, node_name: str, target: str, node: Mapping[str, Any]) -> Step:
        if op == "get_attr":
            self._refuse(
                f"it reads {target[:64]!r} from outside; a loss sees its inputs only: add it to loss_fn_inputs"
            )
        allowed = {"call_function": FUNCTIONS, "call_method": METHODS}.get(op)
        if allowed is None:
            self._refuse(f"it is a {op[:32]}; functions and tensor methods are allowed")
        operation = allowed.get(target)
        if operation is None:
            kind = "function" if op == "call_function" else "tensor method"
            self._refuse(f"{target[:64]!r} is not on the list of allowed {kind}s (tinker_hpc/custom_loss_ops.py)")
        given, keywords = node.get("args", []), node.get("kwargs", {})
        if not isinstance(given, list) or not isinstance(keywords, Mapping):
            self._refuse("its args must be a list and its kwargs an object")
        if operation.path == "getattr":
            return Step(node_name, operation, self._attribute(given, keywords), {})
        if len(given) > operation.most_positional:
            self._refuse(f"{target} takes at most {operation.most_positional} positional arguments, {len(given)} given")
        args = tuple(self._argument(value) for value in given)
        kwargs = {}
        for key, value in keywords.items():
            self._check_keyword(target, key, value)
            if key not in DEFAULTS:
                kwargs[key] = self._argument(value)
        if op == "call_method" and not (args and isinstance(args[0], Ref)):
            self._refuse(f"method {target!r} is called on nothing")
        return Step(node_name, operation, args, kwargs)

    def _attribute(self, args: list[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        if len(args) != 2 or kwargs or args[1] not in ATTRIBUTES:
            what = str(args[1])[:64] if len(args) > 1 else ""
            self._refuse(f"it reads the attribute {what!r}; allowed are {', '.join(ATTRIBUTES)}")
        of = self._argument(args[0])
        if not isinstance(of, Ref):
            self._refuse("it reads an attribute of a constant")
        return of, args[1]

    def _check_keyword(self, target: str, key: str, value: Any) -> None:
        if key not in KEYWORDS | DEFAULTS:
            self._refuse(f"{target} is given {key[:64]!r}, an argument that is not allowed")
        if key == "inplace" and value is not False:
            self._refuse(f"{target} is called with inplace; nothing is changed in place")
        if key in ("size_average", "reduce") and value is not None:
            self._refuse(f"{target} is given {key}; use reduction")

    def _argument(self, value: Any, depth: int = 0) -> Any:
        """One encoded argument (tinker.types.CustomLossNode.args says how)."""
        if depth > MAX_DEPTH:
            self._refuse(f"an argument is nested more than {MAX_DEPTH} deep")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if abs(value) > MAX_INTEGER:
                self._refuse(f"the constant {_brief(value)} is beyond {MAX_INTEGER}; put it into loss_fn_inputs")
            return value
        if isinstance(value, float):
            return value
        if isinstance(value, str):
            if value not in TEXTS:
                self._refuse(
                    f"the text {value[:32]!r} is no argument a loss needs; allowed: {', '.join(sorted(TEXTS))}"
                )
            return value
        if isinstance(value, list):
            return self._items(value, depth)
        if not isinstance(value, Mapping) or len(value) != 1:
            self._refuse(f"an argument is {_brief(value)}, expected a value or an object of one key")
        [(kind, content)] = value.items()
        return self._encoded(kind, content, depth)

    def _encoded(self, kind: str, content: Any, depth: int) -> Any:
        if kind == "ref":
            if not isinstance(content, str) or content not in self._known:
                self._refuse(f"it uses {_brief(content)}, which is no earlier node")
            return Ref(content)
        if kind == "tuple" and isinstance(content, list):
            return tuple(self._items(content, depth))
        if kind == "slice" and isinstance(content, list) and len(content) == 3:
            start, stop, step = self._items(content, depth)
            return slice(start, stop, step)
        if kind == "ellipsis" and content is True:
            return Ellipsis
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "dtype":
            if not isinstance(content, str) or content not in DTYPES:
                self._refuse(f"dtype {_brief(content)} is not allowed; allowed: {', '.join(sorted(DTYPES))}")
            return Dtype(content)
        if kind == "device":
            return Device()
        self._refuse(f"an argument is a {_brief(kind)}, which a loss cannot use")

    def _items(self, values: list[Any], depth: int) -> list[Any]:
        if len(values) > MAX_ITEMS:
            self._refuse(
                f"a constant has {len(values)} entries, at most {MAX_ITEMS} are taken; large constants belong in "
                "loss_fn_inputs"
            )
        return [self._argument(value, depth + 1) for value in values]

    def _output(self, args: Any) -> tuple[str, Mapping[str, str]]:
        pair: Any = args[0] if isinstance(args, list) and len(args) == 1 else None
        if isinstance(pair, Mapping):
            pair = pair.get("tuple")
        if not isinstance(pair, list) or len(pair) != 2:
            self._refuse("a loss returns (loss, metrics)")
        loss, metrics = pair
        if isinstance(metrics, Mapping):
            metrics = metrics.get("dict")
        if not isinstance(metrics, Mapping) or len(metrics) > MAX_ITEMS:
            self._refuse(f"the metrics must be a dictionary of at most {MAX_ITEMS}")
        for key in metrics:
            if not METRIC.fullmatch(key):
                self._refuse(
                    f"metric {key[:80]!r} must be called custom/<name>:sum or custom/<name>:mean, in lowercase"
                )
        refs = {key: self._argument(value) for key, value in {"loss": loss, **metrics}.items()}
        for key, ref in refs.items():
            if not isinstance(ref, Ref):
                self._refuse(f"{key} must be computed from the inputs")
        return refs.pop("loss").node, {key: ref.node for key, ref in refs.items()}


def _brief(value: Any) -> str:
    """A value in an error message; a giant integer is not even written out (Python refuses beyond 4300 digits)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"of about 10^{math.floor(value.bit_length() * math.log10(2))}"
    return repr(value)[:64]
