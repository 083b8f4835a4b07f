"""An uploaded loss in the worker equals the same loss in the SDK; what would take too much is refused, not computed."""

from __future__ import annotations

from typing import Any

import custom_losses
import numpy as np
import pytest
import tinker
import torch
from custom_losses import LOSSES
from tinker.lib.public_interfaces.custom_loss import run_loss_handle, trace_loss

from tinker_hpc import custom_loss
from tinker_hpc.custom_loss_ops import FUNCTIONS, METHODS
from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record, decode, encode
from tinker_hpc.worker.batch import custom_inputs
from tinker_hpc.worker.custom_loss import DATUM_INDEX, CustomLossFn, _find

LENGTHS = (5, 2, 9)


def inputs_of(
    name: str, seed: int = 0, num_targets: int = 3
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Logprobs and the inputs of each datum, by the declared ranks."""
    random = torch.Generator().manual_seed(seed)
    logprobs, inputs = [], []
    for n in LENGTHS:
        shapes = {0: (), 1: (n,), 2: (n, num_targets)}
        drawn = {key: torch.randn(shapes[rank], generator=random) for key, rank in LOSSES[name][1].items()}
        logprobs.append(-drawn.pop("logprobs").exp())
        if "mask" in drawn:
            drawn["mask"] = (drawn["mask"] > -0.5).float()
            drawn["mask"][0] = 1.0
        inputs.append(drawn)
    return logprobs, inputs


def run(loss: Any, logprobs: list[torch.Tensor], data: list[list[torch.Tensor]], order: list[int]) -> Any:
    """As the engine runs it: a micro-batch of the data in `order`. Returns (loss, gradient [T])."""
    packed = torch.cat([logprobs[i] for i in order]).requires_grad_()
    lengths = torch.tensor([len(logprobs[i]) for i in order])
    which = {DATUM_INDEX: torch.tensor(order).repeat_interleave(lengths)}
    values = CustomLossFn(loss, data)(packed, which, torch.arange(len(order)).repeat_interleave(lengths))
    values.backward()
    return values.detach(), packed.grad


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_values_metrics_and_gradients_are_the_sdks(name: str) -> None:
    """In any order and cut into micro-batches in any way."""
    handle = custom_losses.handle(name)
    logprobs, inputs = inputs_of(name)
    datums = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1]),
            loss_fn_inputs={key: tinker.TensorData.from_torch(value) for key, value in each.items()},
        )
        for each in inputs
    ]
    leaves = [each.clone().requires_grad_() for each in logprobs]
    expected, metrics = run_loss_handle(handle, datums, leaves)
    expected.backward()

    loss = custom_loss.read(custom_losses.payload(handle))
    data = [[each[key] for key in handle.input_names] for each in inputs]
    first, second = run(loss, logprobs, data, [2, 0]), run(loss, logprobs, data, [1])
    value = (first[0] + second[0]).item()
    gradient = torch.cat((first[1], second[1]))
    assert value == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.cat([leaves[i].grad for i in (2, 0, 1)]), rtol=1e-6, atol=1e-7)
    ours = CustomLossFn(loss, data).metrics([each.numpy() for each in logprobs])
    assert ours == pytest.approx(metrics, rel=1e-6) and list(ours) == list(metrics)


def test_without_gradients_only_values_are_computed() -> None:
    loss = custom_loss.read(custom_losses.payload(custom_losses.handle("weighted")))
    with torch.no_grad():
        values = CustomLossFn(loss, [[torch.ones(2)]])(
            torch.tensor([-1.0, -2.0]),
            {DATUM_INDEX: torch.zeros(2, dtype=torch.int64)},
            torch.zeros(2, dtype=torch.int64),
        )
    assert values.item() == 3.0 and not values.requires_grad


def test_inputs_come_back_from_the_log_in_their_shapes() -> None:
    arrays = {
        "offsets": np.array([0, 2, 5]),
        "custom.beta": np.array([0.5, 0.25], np.float32),
        "custom.pair": np.arange(5, dtype=np.float32),
        "shapes.pair": np.array([[1, 2], [3, 1]]),
    }
    record = decode(encode(Record({}, arrays)))
    first, second = custom_inputs(record, [("beta", 0), ("pair", 2)])
    assert first[0].shape == () and first[0] == 0.5
    assert first[1].tolist() == [[0, 1]] and second[1].tolist() == [[2], [3], [4]]
    assert custom_inputs(record, []) == [[], []]
    with pytest.raises(RequestError, match="4 values do not fit"):
        custom_inputs(Record({}, {**arrays, "custom.pair": np.zeros(4)}), [("pair", 2)])


def test_every_listed_operation_exists() -> None:
    for operation in (*FUNCTIONS.values(), *METHODS.values()):
        assert callable(_find(operation.path)), operation.path


def evaluate(body: dict[str, Any], tokens: int = 8192) -> None:
    loss = custom_loss.read(body)
    run(loss, [-torch.ones(tokens)], [[torch.ones(tokens)]], [0])


def traced(function: Any) -> dict[str, Any]:
    return custom_losses.payload(trace_loss(function, {"logprobs": 1, "weights": 1}, "session"))


def calling(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A graph that the SDK's tracing would not make: one call, summed onto the logprobs."""
    nodes = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "placeholder", "name": "weights", "target": "weights"},
        {"op": "call_function", "name": "bomb", "target": target, "args": list(args), "kwargs": kwargs},
        {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}]},
        {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "total"}, {"dict": {}}]}]},
    ]
    inputs = [{"name": "logprobs", "rank": 1}, {"name": "weights", "rank": 1}]
    return {"name": "bomb", "inputs": inputs, "graph": {"format": 1, "nodes": nodes}}


LOGPROBS = {"ref": "logprobs"}
BOMBS: dict[str, tuple[Any, str]] = {
    "outer sum": (lambda logprobs, weights: ((logprobs[:, None] + weights).sum(), {}), "67108864 elements, at most"),
    "three times": (lambda logprobs, weights: ((logprobs[:, None, None] * weights[:, None]).sum(), {}), "elements, at"),
    "cube": (
        lambda logprobs, weights: ((logprobs[:, None, None] * weights[:, None] * weights).sum(), {}),
        "at most 16777216 are computed",
    ),
    "zeros": (calling("torch.zeros", 2**31), "2147483648 elements, at most"),
    "zeros of a list": (calling("torch.zeros", [2**16, {"tuple": []}, 2**16]), "sizes are whole numbers"),
    "zeros of a product": (calling("torch.zeros", {"tuple": [2**16, 2**16, 2**16]}), "281474976710656 elements"),
    "ones by keyword": (calling("torch.ones", size=[2**20, 2**20]), "1099511627776 elements"),
    "full": (calling("torch.full", [2**30], 1.0), "1073741824 elements"),
    "arange": (calling("torch.arange", 0, 1, 1e-12), "1000000000000 elements"),
    "arange of one number": (calling("torch.arange", 2**30), "1073741824 elements"),
    "arange by keywords": (calling("torch.arange", start=0, end=2**30, step=-0.5), "2147483648 elements"),
    "arange to infinity": (calling("torch.arange", {"float": "inf"}), "cannot convert float infinity"),
    "tensor by keyword": (calling("torch.index_select", input={"ref": "logprobs"}), "tensors by position"),
    "expand": (lambda logprobs, weights: (logprobs.expand(2**20, -1).sum(), {}), "elements, at most"),
    "repeat": (lambda logprobs, weights: (logprobs.repeat(2**15).sum(), {}), "elements, at most"),
    "outer": (lambda logprobs, weights: (torch.outer(logprobs, weights).sum(), {}), "elements, at most"),
    "matrix product": (lambda logprobs, weights: ((logprobs[:, None] @ weights[None]).sum(), {}), "elements, at most"),
    "index": (
        lambda logprobs, weights: (logprobs[:, None].expand(-1, 1024)[weights.long()].sum(), {}),
        "elements, at most",
    ),
    "list as index": (
        lambda logprobs, weights: (logprobs[[0] * 64].sum(), {}),
        "index with numbers, slices or tensors",
    ),
    "many results": (
        lambda logprobs, weights: (sum((logprobs[:1024, None] + weights[:8192] * k).sum() for k in range(20)), {}),
        "more than 67108864 elements in all",
    ),
    "tower of powers": (lambda logprobs, weights: (logprobs.sum() * (logprobs.shape[0] ** 63) ** 64, {}), "too large"),
    "power of a number": (lambda logprobs, weights: (logprobs.sum() * 2 ** logprobs.shape[0], {}), "a power of 8192"),
    "unbind": (lambda logprobs, weights: (torch.unbind(logprobs)[0], {}), "more than 4096 rows are not taken apart"),
    "a tuple times a number": (calling("operator.mul", {"tuple": [LOGPROBS]}, 2**31), "not a tuple or list of them"),
    "a list times a number": (calling("operator.mul", [LOGPROBS], 2**31), "not a tuple or list of them"),
    "pieces times a number": (
        lambda logprobs, weights: ((logprobs[:4096].split(1024) * 2**31)[0].sum(), {}),
        "not a tuple or list of them",
    ),
    "the sum of nothing": (calling("torch.zeros", 0, 2**31), "2147483648 elements, at most"),
    "sizes in two places": (calling("torch.zeros", 2**20, size=[2**20]), "1099511627776 elements, at most"),
    "a slice of tensors": (
        calling("operator.getitem", LOGPROBS, {"slice": [LOGPROBS, LOGPROBS, None]}),
        "index with numbers, slices or tensors",
    ),
    "a product of long rows": (
        lambda logprobs, weights: ((logprobs.expand(2048, -1) @ weights.expand(2048, -1).t()).sum(), {}),
        "reads or multiplies more than 1073741824 elements",
    ),
    "one view read again and again": (
        lambda logprobs, weights: (sum(x.amax() for x in [logprobs.expand(2048, -1)] * 80), {}),
        "reads or multiplies more than 1073741824 elements",
    ),
    "many pieces": (
        lambda logprobs, weights: (sum(logprobs[:4096].unbind()[k] for k in range(20)), {}),
        "more than 67108864 elements in all",
    ),
    "nonzero by where": (lambda logprobs, weights: (torch.where(weights)[0].sum() + logprobs.sum(), {}), "two values"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_before_they_go_off(case: str) -> None:
    bomb, words = BOMBS[case]
    body = bomb if isinstance(bomb, dict) else traced(bomb)
    with pytest.raises(RequestError) as caught:
        evaluate(body)
    assert words in str(caught.value)


WRONG: dict[str, tuple[Any, str]] = {
    "vector loss": (
        lambda logprobs, weights: (logprobs * weights, {}),
        "must return a scalar loss, got [8192]. Sum it",
    ),
    "integer loss": (lambda logprobs, weights: ((logprobs > 0).sum(), {}), "must return a scalar loss"),
    "detached": (
        lambda logprobs, weights: (logprobs.detach().sum(), {}),
        "does not depend on logprobs. Is there a detach",
    ),
    "unused logprobs": (lambda logprobs, weights: (weights.sum(), {}), "does not depend on logprobs"),
    "shapes": (
        lambda logprobs, weights: ((logprobs[1:] * weights).sum(), {}),
        "must match the size of tensor b (8192) at non-singleton dimension 0. Shapes of its tensors: [8191], [8192].",
    ),
    "dimension": (
        lambda logprobs, weights: (logprobs.sum(dim=3), {}),
        "node 'sum_1' (Tensor.sum): Dimension out of range",
    ),
    "arguments": (lambda logprobs, weights: (logprobs.sum(weights), {}), "(Tensor.sum): sum() received an invalid"),
    "vector metric": (lambda logprobs, weights: (logprobs.sum(), {"custom/a:sum": weights * 2}), "expected a scalar"),
    "log of 0": (lambda logprobs, weights: (torch.log(logprobs + 1).sum(), {}), "the gradient by logprobs[0] is inf"),
    "0 / 0": (lambda logprobs, weights: (((logprobs + 1) / (logprobs + 1)).sum(), {}), "is nan; nothing was added"),
    "method of a size": (lambda logprobs, weights: (logprobs.shape.sum() + logprobs.sum(), {}), "a method of tensors"),
    "list for a tensor": (
        lambda logprobs, weights: (torch.nn.functional.mse_loss(logprobs, [weights]), {}),
        "not a tuple or list of them",
    ),
    "index beyond": (lambda logprobs, weights: (logprobs[weights.long() * 9000].sum(), {}), "out of bounds"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_names_the_datum_and_the_node(case: str) -> None:
    function, words = WRONG[case]
    with pytest.raises(RequestError) as caught:
        evaluate(traced(function))
    assert words in str(caught.value)
    assert "custom loss '<lambda>' on data[0]" in str(caught.value)


PARTS: dict[str, Any] = {
    "max(dim)[0]": lambda logprobs, weights: (logprobs.reshape(2, -1).max(dim=0)[0].sum(), {}),
    "topk[0]": lambda logprobs, weights: (logprobs.topk(2)[0].sum(), {}),
    "chunk": lambda logprobs, weights: ((logprobs.chunk(2)[0] * weights.chunk(2)[1]).sum(), {}),
    "split": lambda logprobs, weights: (torch.split(logprobs, 4)[-1].sum(), {}),
    "unbind": lambda logprobs, weights: (logprobs.unbind()[3] * 2, {}),
    "sort": lambda logprobs, weights: (torch.sort(logprobs).values[:3].sum(), {}),
    "norm": lambda logprobs, weights: (logprobs.norm() + torch.linalg.vector_norm(logprobs, 1), {}),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_what_an_operation_returns(case: str) -> None:
    """Those that return several tensors, by index and by name, as the function itself has them."""
    random = torch.Generator().manual_seed(3)
    logprobs, weights = torch.randn(8, generator=random), torch.rand(8, generator=random)
    leaf = logprobs.clone().requires_grad_()
    expected, _ = PARTS[case](leaf, weights)
    expected.backward()
    value, gradient = run(custom_loss.read(traced(PARTS[case])), [logprobs], [[weights]], [0])
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, leaf.grad)


def test_the_users_inputs_are_not_the_workers_memory() -> None:
    """Nothing on the list writes, and what comes from the log is a copy all the same."""
    record = Record({}, {"offsets": np.array([0, 2]), "custom.a": np.zeros(2, np.float32), "shapes.a": np.array([[2]])})
    [[a]] = custom_inputs(record, [("a", 1)])
    a += 1
    assert not record.arrays["custom.a"].any()
