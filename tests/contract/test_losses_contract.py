"""Every published loss through the stock SDK: its value, and the step it makes, against closed forms and peft."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import custom_losses
import numpy as np
import pytest
import serving
import tinker
import torch
from closed_forms import CLOSED

from tinker_hpc.gateway.checkpoints import TinkerPath
from tinker_hpc.loss_table import KNOWN_LOSSES

pytestmark = pytest.mark.slow  # needs the worker

WAIT_S = 60
LENGTHS = (9, 4, 12)
LR = tinker.AdamParams(learning_rate=1e-3)


@functools.cache
def sequences() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(21)
    return tuple(random.integers(3, 1000, n + 1) for n in LENGTHS)


def datums(*inputs: dict[str, Any]) -> list[tinker.Datum]:
    """The sequences, with these loss inputs; target_tokens are the next tokens unless given."""
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
            loss_fn_inputs={"target_tokens": tokens[1:], **given},
        )
        for tokens, given in zip(sequences(), inputs, strict=True)
    ]


def cut(flat: np.ndarray) -> list[np.ndarray]:
    return np.split(flat.astype(np.float32), np.cumsum(LENGTHS)[:-1])


def logprobs(output: tinker.ForwardBackwardOutput) -> list[np.ndarray]:
    return [each["logprobs"].to_numpy() for each in output.loss_fn_outputs]


def cross_entropy(weights: np.ndarray) -> list[tinker.Datum]:
    return datums(*({"weights": row} for row in cut(weights)))


def new_client(service: serving.Service, service_client: tinker.ServiceClient) -> tinker.TrainingClient:
    return service_client.create_lora_training_client(base_model=service.base_model, rank=4, seed=3).result(WAIT_S)


def policy_inputs(p: np.ndarray, name: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    advantages = random.normal(size=p.size)
    advantages[[0, 1, 9, 13]] = 0.0  # prompts
    inputs = {
        "logprobs": p + random.normal(scale=0.4, size=p.size),
        "advantages": advantages,
        "sequence_ratio_mask": (advantages != 0).astype(float),
        "clip_low_threshold": random.uniform(0.5, 0.9, p.size),
    }
    kept = {*KNOWN_LOSSES[name].required, *KNOWN_LOSSES[name].optional} & set(inputs)
    return {key: inputs[key].astype(np.float32) for key in kept}


@pytest.mark.parametrize("name", sorted(set(KNOWN_LOSSES) - {"cross_entropy"}))
def test_a_policy_loss_has_its_value_and_takes_its_step(service, service_client, name):
    """The step is that of cross_entropy with weights -dL/dlogprob, dL/dlogprob from the closed form."""
    ours, twin = (new_client(service, service_client) for _ in range(2))
    p = np.concatenate(logprobs(ours.forward(cross_entropy(np.ones(sum(LENGTHS))), "cross_entropy").result(WAIT_S)))
    inputs = policy_inputs(p, name)
    config = {key: value * 1.05 for key, value in KNOWN_LOSSES[name].config.items()}
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*map(cut, inputs.values()), strict=True)]
    output = ours.forward_backward(datums(*rows), name, config).result(WAIT_S)

    double = {key: values.astype(np.float64) for key, values in inputs.items()}
    double["sampling_logprobs"] = double.pop("logprobs")
    segments = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    value, gradient = CLOSED[name](p.astype(np.float64), double, segments, config)
    assert output.metrics["loss:sum"] == pytest.approx(value, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(np.concatenate(logprobs(output)), p, atol=1e-5)

    twin.forward_backward(cross_entropy(-gradient), "cross_entropy").result(WAIT_S)
    norms = [client.optim_step(LR).result(WAIT_S).metrics["grad_norm:mean"] for client in (ours, twin)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    after = [client.forward(cross_entropy(-gradient), "cross_entropy").result(WAIT_S) for client in (ours, twin)]
    for a, b in zip(*map(logprobs, after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert max(np.abs(a - b).max() for a, b in zip(logprobs(after[0]), cut(p), strict=True)) > 1e-3, "it moved"


# ---- several targets a token


def several(num_targets: int, *, zeros: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(targets, weights) [N, K] of each sequence; `zeros` is the share of targets left empty: id 0, weight 0."""
    random = np.random.default_rng(8)
    drawn = []
    for n in LENGTHS:
        shown = random.random((n, num_targets)) >= zeros
        targets = np.where(shown, random.integers(1, 1000, shown.shape), 0)
        weights = np.where(shown, random.dirichlet(np.ones(num_targets), n), 0.0)
        drawn.append((torch.tensor(targets), torch.tensor(weights, dtype=torch.float32)))
    return drawn


def soft_datums(drawn: list[tuple[torch.Tensor, torch.Tensor]], *, sparse: bool) -> list[tinker.Datum]:
    """The SDK sends a 2-D torch tensor as CSR where that is smaller, and a numpy array as it is."""
    if sparse:
        return datums(*({"target_tokens": t, "weights": w} for t, w in drawn))
    return datums(*({"target_tokens": t.numpy(), "weights": w.numpy()} for t, w in drawn))


def peft_reference(folder: Path, base: str, drawn: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """The same pass in transformers + peft, from the adapter we saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for names it is about to lose
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    loss, rows = torch.zeros(()), []
    for tokens, (targets, weights) in zip(sequences(), drawn, strict=True):
        logits = model(torch.from_numpy(tokens[:-1])[None]).logits[0]
        rows.append(logits.log_softmax(-1).gather(1, targets))
        loss = loss - (rows[-1] * weights).sum()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item()
    return {"loss": loss.item(), "logprobs": [row.detach().numpy() for row in rows], "norm": norm}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_several_targets_a_token_are_those_of_peft(service, service_client, sparse):
    if service.run is None:
        pytest.skip("reads the adapter's files: run without TINKER_HPC_CONTRACT_BASE_URL")
    drawn = several(6, zeros=0.8 if sparse else 0.0)
    data = soft_datums(drawn, sparse=sparse)
    encodings = [each.loss_fn_inputs[key].sparse_crow_indices for each in data for key in ("target_tokens", "weights")]
    assert all((rows is not None) == sparse for rows in encodings), "what goes over the wire"
    client = new_client(service, service_client)
    client.forward_backward(cross_entropy(np.ones(sum(LENGTHS))), "cross_entropy")
    client.optim_step(LR).result(WAIT_S)  # B is zero before
    path = client.save_state("soft").result(WAIT_S).path
    reference = peft_reference(TinkerPath.parse(path).folder(service.run.data_root), service.base_model, drawn)

    output = client.forward_backward(data, "cross_entropy").result(WAIT_S)
    for ours, theirs in zip(output.loss_fn_outputs, reference["logprobs"], strict=True):
        assert ours["logprobs"].shape == list(theirs.shape)
        np.testing.assert_allclose(ours["logprobs"].to_numpy(), theirs, atol=5e-5)
    assert output.metrics["loss:sum"] == pytest.approx(reference["loss"], rel=1e-5)
    norm = client.optim_step(LR).result(WAIT_S).metrics["grad_norm:mean"]
    assert norm == pytest.approx(reference["norm"], rel=1e-4)


def test_a_custom_loss_of_the_users_own_sees_all_targets(service, service_client):
    """The client-side path: forward, the user's function, and a pass with its gradient as weights, all [N, K]."""
    drawn = several(3, zeros=0.0)

    def soft_loss(data, rows):
        assert [tuple(row.shape) for row in rows] == [(n, 3) for n in LENGTHS]
        return -sum((row * weights).sum() for row, (_, weights) in zip(rows, drawn, strict=True)), {}

    custom, plain = (new_client(service, service_client) for _ in range(2))
    data = soft_datums(drawn, sparse=False)
    output = custom.forward_backward_custom(data, soft_loss).result(WAIT_S)
    direct = plain.forward_backward(data, "cross_entropy").result(WAIT_S)
    assert output.metrics["loss:sum"] == pytest.approx(direct.metrics["loss:sum"], rel=1e-6)
    norms = [client.optim_step(LR).result(WAIT_S).metrics["grad_norm:mean"] for client in (custom, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# ---- uploaded losses: one pass on the server


CUSTOM = ("focal", "dpo_like", "clipped_with_entropy", "distilled")


def custom_data(name: str) -> list[tinker.Datum]:
    random = torch.Generator().manual_seed(4)
    data = []
    for tokens, n in zip(sequences(), LENGTHS, strict=True):
        shapes = {0: (), 1: (n,), 2: (n, 3)}
        ranks = {**custom_losses.LOSSES[name][1], "unread": 1}
        inputs = {key: torch.randn(shapes[rank], generator=random) for key, rank in ranks.items()}
        logprobs = inputs.pop("logprobs")
        if "mask" in inputs:
            inputs["mask"] = torch.ones(n)
        if logprobs.ndim == 2:
            inputs["target_tokens"] = torch.randint(0, 1000, (n, 3), generator=random)
        given = {key: tinker.TensorData.from_torch(value) for key, value in inputs.items()}
        given.setdefault("target_tokens", tinker.TensorData.from_numpy(tokens[1:]))
        data.append(tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1].tolist()), given))
    return data


@pytest.mark.parametrize("name", CUSTOM)
def test_a_loss_on_the_server_equals_the_same_beside_the_loop(service, name):
    """Value, metrics, logprobs and the step. `replace(handle, loss_id=None)` is the SDK's own client-side path."""
    function, ranks = custom_losses.LOSSES[name]
    connection = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    handle = connection.create_custom_loss(function, ranks).result(WAIT_S)
    assert handle.loss_id is not None, "it was uploaded"
    here, there = (new_client(service, connection) for _ in range(2))
    data = custom_data(name)
    outputs = [
        client.forward_backward_custom(data, each).result(WAIT_S)
        for client, each in ((there, handle), (here, dataclasses.replace(handle, loss_id=None)))
    ]
    metrics = [dict(output.metrics) for output in outputs]
    metrics[1].pop("surrogate_loss:sum")
    assert metrics[0].keys() == metrics[1].keys()
    for key, value in metrics[0].items():
        assert value == pytest.approx(metrics[1][key], rel=1e-6, abs=1e-6), key
    for a, b in zip(*map(logprobs, outputs), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-6, atol=1e-6)
    norms = [client.optim_step(LR).result(WAIT_S).metrics["grad_norm:mean"] for client in (there, here)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0
    probe = cross_entropy(np.ones(sum(LENGTHS)))
    after = [client.forward(probe, "cross_entropy").result(WAIT_S) for client in (there, here)]
    for a, b in zip(*map(logprobs, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_chunks_of_a_call_are_invisible(service):
    """The SDK cuts a large call into requests: their sums and means are those of one."""
    function, ranks = custom_losses.LOSSES["focal"]
    connection = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    handle = connection.create_custom_loss(function, ranks).result(WAIT_S)
    whole, cut = (new_client(service, connection) for _ in range(2))
    data = custom_data("focal")
    expected = whole.forward_backward_custom(data, handle).result(WAIT_S)
    pieces = [cut.forward_backward_custom([datum], handle) for datum in data]
    outputs = [piece.result(WAIT_S) for piece in pieces]
    for key, value in expected.metrics.items():
        total = sum(output.metrics[key] for output in outputs)
        assert value == pytest.approx(total / (len(data) if key.endswith(":mean") else 1), rel=1e-5)
    norms = [client.optim_step(LR).result(WAIT_S).metrics["grad_norm:mean"] for client in (whole, cut)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_loss_that_fails_adds_nothing_and_the_client_goes_on(service):
    connection = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)

    def steep(logprobs, weights):
        return torch.log((logprobs * weights).sum() * 0.0), {}

    handle = connection.create_custom_loss(steep, {"logprobs": 1, "weights": 1}).result(WAIT_S)
    client = new_client(service, connection)
    data = cross_entropy(np.ones(sum(LENGTHS)))
    with pytest.raises(tinker.RequestFailedError, match="custom loss 'steep' on data") as caught:
        client.forward_backward_custom(data, handle).result(WAIT_S)
    assert caught.value.category is tinker.types.RequestErrorCategory.User
    assert client.optim_step(LR).result(WAIT_S).metrics["grad_norm:mean"] == 0.0
    assert np.isfinite(client.forward_backward(data, "cross_entropy").result(WAIT_S).metrics["loss:sum"])
