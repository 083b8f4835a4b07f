"""Which graphs are losses: what the SDK sends of honest ones, and a table of what must never be built."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import custom_losses
import pytest

from tinker_hpc import custom_loss
from tinker_hpc.custom_loss import Ref
from tinker_hpc.errors import RequestError


@pytest.mark.parametrize("name", sorted(custom_losses.LOSSES))
def test_what_the_sdk_sends_is_read(name: str) -> None:
    handle = custom_losses.handle(name)
    body = custom_losses.payload(handle)
    loss = custom_loss.read(json.loads(json.dumps(body)))
    assert loss.name == name
    assert loss.inputs == tuple((each.name, each.rank) for each in handle.inputs)
    nodes = [node for node in handle.graph.graph.nodes if node.op not in ("placeholder", "output")]
    assert [step.node for step in loss.steps] == [node.name for node in nodes]
    assert loss.loss in {step.node for step in loss.steps}


def test_an_id_is_its_content() -> None:
    one, same, other = (custom_losses.payload(custom_losses.handle(n)) for n in ("focal", "focal", "smooth"))
    same = {**json.loads(json.dumps(same)), "session_id": "another", "custom_loss_seq_id": 7}
    assert custom_loss.loss_id(one) == custom_loss.loss_id(same) != custom_loss.loss_id(other)


def node(op: str, target: str, *args: Any, name: str = "x", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


REF = {"ref": "logprobs"}
PLACEHOLDER = node("placeholder", "logprobs", name="logprobs")
OUTPUT = node("output", "output", {"tuple": [{"ref": "x"}, {"dict": {}}]}, name="output")


def graph(*nodes: dict[str, Any], output: dict[str, Any] = OUTPUT) -> dict[str, Any]:
    inputs = [{"name": "logprobs", "rank": 1}]
    return {"name": "hostile", "inputs": inputs, "graph": {"format": 1, "nodes": [PLACEHOLDER, *nodes, output]}}


def function(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return graph(node("call_function", target, *args, **kwargs))


def method(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return graph(node("call_method", target, *args, **kwargs))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"tuple": [value]}
    return value


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    body = copy.deepcopy(function("torch.sum", REF))
    change(body)
    return body


def returning(*pair: Any) -> dict[str, Any]:
    return graph(
        node("call_function", "torch.sum", REF), output=node("output", "output", {"tuple": list(pair)}, name="y")
    )


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "attribute of Python": (
        function("getattr", REF, "__class__"),
        "reads the attribute '__class__'; allowed are shape",
    ),
    "attribute of autograd": (function("getattr", REF, "grad_fn"), "reads the attribute 'grad_fn'"),
    "attribute by another name": (function("getattr", REF, REF), "reads the attribute"),
    "attribute with a default": (function("getattr", REF, "shape", 0), "reads the attribute"),
    "attribute of a constant": (function("getattr", 1, "shape"), "an attribute of a constant"),
    "captured tensor": (graph(node("get_attr", "_tensor_constant0")), "reads '_tensor_constant0' from outside"),
    "module": (graph(node("call_module", "layer", REF)), "it is a call_module"),
    "unknown op": (graph(node("call_shell", "rm", REF)), "it is a call_shell"),
    "unknown function": (function("torch.load", "/etc/passwd"), "'torch.load' is not on the list of allowed functions"),
    "builtin": (function("builtins.eval", "none"), "'builtins.eval' is not on the list"),
    "operator that calls": (function("operator.methodcaller", "none"), "'operator.methodcaller' is not on the list"),
    "private function": (function("torch._C._nn.linear", REF), "is not on the list"),
    "dotted path": (function("torch.sum.__globals__", REF), "is not on the list"),
    "random numbers": (function("torch.rand", 4), "'torch.rand' is not on the list"),
    "in-place method": (method("mul_", REF, 2), "'mul_' is not on the list of allowed tensor methods"),
    "leaves torch": (method("item", REF), "'item' is not on the list"),
    "backward": (method("backward", REF), "'backward' is not on the list"),
    "moves to a device": (method("cuda", REF), "'cuda' is not on the list"),
    "private method": (method("__reduce__", REF), "'__reduce__' is not on the list"),
    "method of a constant": (method("sum", 3), "method 'sum' is called on nothing"),
    "out=": (function("torch.exp", REF, out=REF), "is given 'out', an argument that is not allowed"),
    "generator=": (function("torch.sum", REF, generator=None), "is given 'generator'"),
    "inplace=True": (function("torch.nn.functional.relu", REF, inplace=True), "is called with inplace"),
    "inplace by position": (function("torch.nn.functional.relu", REF, True), "at most 1 positional arguments, 2 given"),
    "giant integer": (function("torch.add", REF, 10**5000), "it has a giant constant"),
    "giant of a few bytes": (function("torch.add", REF, 10**400), "the constant of about 10^400 is beyond 2147483648"),
    "large integer": (function("torch.add", REF, 2**40), "the constant 1099511627776 is beyond"),
    "giant list": (function("torch.stack", [REF] * 1000), "a constant has 1000 entries, at most 64 are taken"),
    "deep nesting": (function("torch.add", REF, nested(50)), "nested more than 6 deep"),
    "bottomless nesting": (function("torch.add", REF, nested(50_000)), "it has a giant constant"),
    "text": (function("torch.add", REF, "a" * 1000), "is no argument a loss needs"),
    "dtype": (function("torch.sum", REF, dtype={"dtype": "complex64"}), "dtype 'complex64' is not allowed"),
    "unhashable dtype": (function("torch.sum", REF, dtype={"dtype": []}), "is not allowed; allowed: "),
    "layout": (function("torch.zeros", 3, layout={"layout": "sparse_csr"}), "is given 'layout'"),
    "unknown encoding": (function("torch.sum", {"pickle": "gASV"}), "an argument is a 'pickle'"),
    "two encodings": (function("torch.sum", {"ref": "logprobs", "tuple": []}), "an object of one key"),
    "a later node": (function("torch.sum", {"ref": "output"}), "which is no earlier node"),
    "itself": (function("torch.sum", {"ref": "x"}), "which is no earlier node"),
    "unhashable reference": (function("torch.sum", {"ref": []}), "which is no earlier node"),
    "too many nodes": (
        graph(*(node("call_function", "torch.exp", REF, name=f"x{i}") for i in range(2000))),
        "it has 2002 nodes, at most 512 are taken",
    ),
    "too many bytes": (graph(node("call_function", "torch.sum", REF, name="x" * 300_000)), "bytes, at most 262144"),
    "a name twice": (graph(*[node("call_function", "torch.sum", REF)] * 2), "that no other node has"),
    "a name that is code": (
        graph(node("call_function", "torch.sum", REF, name="x; import os")),
        "is not one of letters, digits and underscores",
    ),
    "no output": (changed(lambda body: body["graph"]["nodes"].pop()), "there is no output node"),
    "an early output": (graph(OUTPUT | {"args": []}), "an output is the last node"),
    "no tuple": (
        graph(node("call_function", "torch.sum", REF), output=node("output", "output", REF, name="y")),
        "(loss, metrics)",
    ),
    "a constant loss": (returning(1.0, {"dict": {}}), "loss must be computed from the inputs"),
    "metric named as the trainer's": (returning({"ref": "x"}, {"dict": {"loss:sum": REF}}), "must be called custom/"),
    "metric of another reduction": (returning({"ref": "x"}, {"dict": {"custom/a:max": REF}}), "must be called custom/"),
    "a constant metric": (returning({"ref": "x"}, {"dict": {"custom/a:sum": 1.0}}), "custom/a:sum must be computed"),
    "no logprobs": (
        changed(lambda body: body.update(inputs=[{"name": "weights", "rank": 1}])),
        "first must be logprobs",
    ),
    "logprobs of rank 0": (changed(lambda body: body.update(inputs=[{"name": "logprobs", "rank": 0}])), "rank 1 or 2"),
    "rank 3": (changed(lambda body: body["inputs"][0].update(rank=3)), "a rank is 0 (a number), 1 ([T]) or 2"),
    "a rank that is none": (changed(lambda body: body["inputs"][0].update(rank=True)), "logprobs has rank True"),
    "an input not declared": (
        graph(node("placeholder", "weights", name="weights"), node("call_function", "torch.sum", REF)),
        "the graph takes logprobs, weights; the declared inputs are logprobs",
    ),
    "an input with a default": (
        changed(lambda body: body["graph"]["nodes"][0].update(args=[1])),
        "an input has no default",
    ),
    "many inputs": (changed(lambda body: body.update(inputs=[{"name": "a", "rank": 1}] * 40)), "1 to 16 of them"),
    "another format": (changed(lambda body: body["graph"].update(format=2)), 'must be {"format": 1'),
    "no graph": (changed(lambda body: body.update(graph="code")), 'must be {"format": 1'),
    "no nodes": (changed(lambda body: body["graph"].update(nodes={"a": 1})), 'must be {"format": 1'),
    "nodes of nothing": (changed(lambda body: body["graph"].update(nodes=[1])), "must be objects"),
    "a node without a name": (
        changed(lambda body: body["graph"]["nodes"][1].update(name=None)),
        "must be a short text",
    ),
    "args that are none": (changed(lambda body: body["graph"]["nodes"][1].update(args=3)), "args must be a list"),
    "no name": (changed(lambda body: body.update(name="")), "needs a name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_graphs_are_refused_in_words(case: str) -> None:
    body, words = HOSTILE[case]
    with pytest.raises(RequestError) as caught:
        custom_loss.read(body)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000, "the answer to a giant is no giant"


def test_arguments_are_read_as_the_sdk_encodes_them() -> None:
    args = [REF, {"float": "-inf"}, {"slice": [None, 2, None]}, {"ellipsis": True}, {"tuple": [1, [2]]}, True, None]
    (step,) = custom_loss.read(function("torch.clamp", *args, min={"float": "nan"})).steps
    assert step.args == (Ref("logprobs"), -math.inf, slice(None, 2, None), Ellipsis, (1, [2]), True, None)
    assert math.isnan(step.kwargs["min"])


def test_reading_needs_no_torch() -> None:
    code = "import sys; import tinker_hpc.custom_loss; assert not {'torch', 'tinker'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
