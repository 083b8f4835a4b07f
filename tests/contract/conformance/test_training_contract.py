"""Training: order, accumulation, retries, failures, states, as the stock SDK needs them of any server."""

from __future__ import annotations

import contextlib
import math
import re

import numpy as np
import pytest
import serving
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_request import ForwardBackwardRequest

pytestmark = pytest.mark.slow  # the first test waits for a worker to start

LR = tinker.AdamParams(learning_rate=1e-3)
WAIT_S = 60
done = serving.done


def datum(seed: int, length: int = 12, weight: float = 1.0) -> tinker.Datum:
    tokens = np.random.default_rng(seed).integers(3, 1000, length + 1).tolist()
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [weight] * length},
    )


def logprobs(output: tinker.ForwardBackwardOutput) -> list[np.ndarray]:
    return [each["logprobs"].to_numpy() for each in output.loss_fn_outputs]


def forward(client: tinker.TrainingClient, *data: tinker.Datum) -> list[np.ndarray]:
    return logprobs(client.forward(list(data), "cross_entropy").result(WAIT_S))


def test_info_and_tokenizer(training_client, server):
    info = training_client.get_info()
    assert info.is_lora and info.lora_rank == 4 and info.model_id == training_client.model_id
    tokenizer = training_client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("two and two")) == "two and two"


def test_a_step_learns_and_reports(training_client):
    data = [datum(1, 12), datum(2, 7)]
    losses = []
    for _ in range(4):
        passed = training_client.forward_backward(data, "cross_entropy")
        stepped = training_client.optim_step(LR)
        output = passed.result(WAIT_S)
        losses.append(output.metrics["loss:sum"])
        assert stepped.result(WAIT_S).metrics["grad_norm:mean"] > 0
        assert [row.shape for row in logprobs(output)] == [(12,), (7,)]
        assert math.isclose(-sum(map(np.sum, logprobs(output))), losses[-1], rel_tol=1e-4)
    assert losses[-1] < losses[0]


def test_two_passes_are_one_joined_pass(server, service_client):
    data = [datum(3), datum(4, 5)]
    after = []
    for calls in ([data], [data[:1], data[1:]]):
        client = done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=7))
        for call in calls:
            client.forward_backward(call, "cross_entropy").result(WAIT_S)
        client.optim_step(LR).result(WAIT_S)
        after.append(np.concatenate(forward(client, *data)))
    np.testing.assert_allclose(after[0], after[1], atol=1e-5)


def test_forward_leaves_no_gradient(training_client):
    before = forward(training_client, datum(5))
    training_client.optim_step(LR).result(WAIT_S)
    np.testing.assert_array_equal(forward(training_client, datum(5))[0], before[0])


def test_many_requests_in_flight_run_in_order(training_client):
    futures = []
    for step in range(6):
        futures.append(training_client.forward_backward([datum(6)], "cross_entropy"))
        futures.append(training_client.optim_step(LR))
        if step == 2:
            futures.append(training_client.save_state("middle"))
    losses = [f.result(WAIT_S).metrics["loss:sum"] for f in futures if hasattr(f.result(WAIT_S), "loss_fn_outputs")]
    assert losses == sorted(losses, reverse=True)


def test_a_custom_loss_of_the_users_own_equals_cross_entropy(server, service_client):
    def negative_sum(data, rows):
        loss = -sum((row * 1.0).sum() for row in rows)
        return loss, {"seen": float(len(rows))}

    after = []
    for custom in (False, True):
        client = done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=8))
        if custom:
            output = client.forward_backward_custom([datum(9)], negative_sum).result(WAIT_S)
            assert output.metrics["seen"] == 1.0
        else:
            client.forward_backward([datum(9)], "cross_entropy").result(WAIT_S)
        client.optim_step(LR).result(WAIT_S)
        after.append(forward(client, datum(9))[0])
    np.testing.assert_allclose(after[0], after[1], atol=1e-5)


def test_state_comes_back_with_and_without_the_optimizer(service_client, training_client):
    data = [datum(10)]
    for _ in range(2):
        training_client.forward_backward(data, "cross_entropy")
        training_client.optim_step(LR).result(WAIT_S)
    path = training_client.save_state("resume", ttl_seconds=3600).result(WAIT_S).path
    now = forward(training_client, *data)[0]

    def step(client: tinker.TrainingClient) -> np.ndarray:
        client.forward_backward(data, "cross_entropy")
        client.optim_step(LR).result(WAIT_S)
        return forward(client, *data)[0]

    resumed = done(service_client.create_training_client_from_state_with_optimizer(path))
    fresh = done(service_client.create_training_client_from_state(path))
    for client in (resumed, fresh):
        np.testing.assert_array_equal(forward(client, *data)[0], now)
        assert client.get_info().lora_rank == 4
    continued = step(training_client)
    np.testing.assert_array_equal(step(resumed), continued)
    assert np.abs(step(fresh) - continued).max() > 1e-6, "a fresh optimizer takes another step"


def test_saving_under_the_same_name_needs_overwrite(training_client):
    training_client.save_state("same").result(WAIT_S)
    with pytest.raises(tinker.RequestFailedError) as caught:
        training_client.save_state("same").result(WAIT_S)
    assert caught.value.category is tinker.types.RequestErrorCategory.User
    training_client.save_state("same", overwrite=True).result(WAIT_S)


def raw_pass(server: serving.Service, model_id: str, seq_id: int, data: tinker.Datum) -> serving.Reply:
    request = ForwardBackwardRequest(
        forward_backward_input=tinker.types.ForwardBackwardInput(data=[data], loss_fn="cross_entropy"),
        model_id=model_id,
        seq_id=seq_id,
    )
    body = forward_backward_request_to_proto(request).SerializeToString()
    return server.post("forward_backward", body, headers={"Content-Type": "application/x-protobuf"})


def retrieved(server: serving.Service, reply: serving.Reply) -> serving.Reply:
    """The result of an accepted request: asked for again while the server says "not yet"."""
    while (answer := server.post("retrieve_future", {"request_id": reply.json["request_id"]})).status == 408:
        pass
    return answer


def adam(server: serving.Service, model_id: str, seq_id: int, learning_rate: float = 1e-3) -> serving.Reply:
    params = {"learning_rate": learning_rate}
    return server.post("optim_step", {"model_id": model_id, "seq_id": seq_id, "adam_params": params})


def test_one_call_cut_into_many_requests_is_the_same_call(server, service_client):
    """The SDK sends the pieces at once, the first one last: the server holds those that came too early."""
    data = [datum(20 + number, 3 + number) for number in range(5)]
    outputs, after = [], []
    for pieces_of in (None, 2):
        client = done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=7))
        with chunks_of(client, pieces_of):
            outputs.append(client.forward_backward(data, "cross_entropy").result(WAIT_S))
        client.optim_step(LR).result(WAIT_S)
        after.append(np.concatenate(forward(client, *data)))
    whole, cut = outputs
    assert len(cut.loss_fn_outputs) == len(data)
    np.testing.assert_allclose(np.concatenate(logprobs(whole)), np.concatenate(logprobs(cut)), atol=1e-5)
    assert set(whole.metrics) == set(cut.metrics)
    assert math.isclose(whole.metrics["loss:sum"], cut.metrics["loss:sum"], rel_tol=1e-5)
    np.testing.assert_allclose(after[0], after[1], atol=1e-5)


@contextlib.contextmanager
def chunks_of(client: tinker.TrainingClient, length: int | None):
    """Let the SDK cut calls into pieces of at most `length` datums."""
    holder = client.holder
    before = holder._client_config
    if length is not None:
        holder._client_config = before.model_copy(update={"fwdbwd_max_chunk_len": length})
    try:
        yield
    finally:
        holder._client_config = before


def test_a_failed_request_does_not_stall_or_change_what_follows(server, service_client):
    after = []
    for wrong in (False, True):
        client = done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=9))
        futures = [client.forward_backward([datum(30)], "cross_entropy")]
        if wrong:
            failing = client.forward_backward([datum(31)], "cross_entropy", {"no_such_key": 1.0})
            failing_step = client.optim_step(tinker.AdamParams(beta1=-1.0))
        futures.append(client.optim_step(LR))
        for future in futures:
            future.result(WAIT_S)
        if wrong:
            for future in (failing, failing_step):
                with pytest.raises(tinker.RequestFailedError) as caught:
                    future.result(WAIT_S)
                assert caught.value.category is tinker.types.RequestErrorCategory.User
        after.append(forward(client, datum(30))[0])
    np.testing.assert_array_equal(after[0], after[1])


def test_metrics_are_named_name_colon_reduction(training_client):
    """The SDK splits them at the colon and joins the pieces of a call by the reduction."""
    known = {"mean", "sum", "min", "max", "slack", "hash2", "unique"}
    passed = training_client.forward_backward([datum(32)], "cross_entropy")
    clipped = training_client.optim_step(tinker.AdamParams(learning_rate=1e-3, grad_clip_norm=1e12)).result(WAIT_S)
    for metrics in (passed.result(WAIT_S).metrics, clipped.metrics or {}):
        for name in metrics:
            assert re.fullmatch(r"[^:]+:(\w+)", name) and name.partition(":")[2] in known, name
    assert "loss:sum" in passed.result(WAIT_S).metrics


def test_requests_out_of_order_wait_for_the_gap(server, service_client, training_client):
    model_id = training_client.model_id
    late = [adam(server, model_id, 2), raw_pass(server, model_id, 3, datum(11))]
    first = raw_pass(server, model_id, 1, datum(11))
    for reply in (*late, first):
        assert reply.status == 200, reply.body
    for reply in (first, *late):
        result = retrieved(server, reply)
        assert result.status == 200, result.body
    twin = done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=1))
    twin.forward_backward([datum(11)], "cross_entropy")
    twin.optim_step(LR).result(WAIT_S)
    expected = forward(twin, datum(11))[0]
    np.testing.assert_array_equal(state_after(server, service_client, model_id, 4), expected)


def state_after(server: serving.Service, service_client: tinker.ServiceClient, model_id: str, seq_id: int):
    """Logprobs of datum(11) by a model that raw requests have trained, whose next number is `seq_id`."""
    ask = {"model_id": model_id, "seq_id": seq_id, "path": f"raw-{seq_id}"}
    path = retrieved(server, server.post("save_weights", ask)).json["path"]
    return forward(done(service_client.create_training_client_from_state(path)), datum(11))[0]


def test_a_retry_is_one_request_and_a_changed_one_is_refused(server, service_client, training_client):
    model_id = training_client.model_id
    first, again = (raw_pass(server, model_id, 1, datum(11)) for _ in range(2))
    assert first.json == again.json
    assert adam(server, model_id, 2).json == adam(server, model_id, 2).json
    changed = adam(server, model_id, 2, learning_rate=0.5)
    assert 400 <= changed.status < 500 and changed.json
    twin = done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=1))
    twin.forward_backward([datum(11)], "cross_entropy")
    twin.optim_step(LR).result(WAIT_S)
    expected = forward(twin, datum(11))[0]
    np.testing.assert_array_equal(state_after(server, service_client, model_id, 3), expected)


def test_a_retried_snapshot_may_come_with_another_sampler_number(server, training_client):
    """tinker 0.38 counts the sampler up on every retry of the same request: the number says nothing of which it is."""

    def snapshot(seq_id, number):
        ask = {"model_id": training_client.model_id, "seq_id": seq_id, "kind": "snapshot"}
        return server.post("save_weights_for_sampler", {**ask, "sampling_session_seq_id": number})

    replies = [snapshot(1, 7001), snapshot(1, 7002)]
    assert replies[0].status == 200 and replies[0].json == replies[1].json
    first, second = (retrieved(server, reply).json["sampling_session_id"] for reply in (replies[0], snapshot(2, 7001)))
    assert first != second
    assert all(server.get(f"samplers/{sampler}").status == 200 for sampler in (first, second))


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
def test_what_the_rest_client_reads(service_client, training_client):
    state = training_client.save_state("listed").result(WAIT_S).path
    sampler = training_client.save_weights_for_sampler("listed").result(WAIT_S).path
    rest = service_client.create_rest_client()
    run = rest.get_training_run_by_tinker_path(state).result(WAIT_S)
    assert (run.training_run_id, run.lora_rank, run.is_lora) == (training_client.model_id, 4, True)
    assert run.last_checkpoint.tinker_path == state
    assert run.last_sampler_checkpoint.tinker_path == sampler
    listed = rest.list_checkpoints(training_client.model_id).result(WAIT_S).checkpoints
    assert {each.tinker_path for each in listed} == {state, sampler}
    assert all(each.size_bytes > 0 for each in listed)
    info = rest.get_weights_info_by_tinker_path(state).result(WAIT_S)
    assert (info.lora_rank, info.train_mlp, info.train_unembed) == (4, True, True)
    assert info.base_model == training_client.get_info().model_data.model_name
    assert training_client.model_id in {
        r.training_run_id for r in rest.list_training_runs().result(WAIT_S).training_runs
    }
    assert state in {c.tinker_path for c in rest.list_user_checkpoints().result(WAIT_S).checkpoints}
    served = done(service_client.get_server_capabilities()).supported_models
    (model,) = (m for m in served if m.model_name == training_client.get_info().model_data.model_name)
    assert model.max_context_length is None or model.max_context_length > 0


@pytest.mark.since("0.28")
def test_another_client_of_the_same_key(server):
    client = tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key)
    trainer = done(client.create_lora_training_client(base_model=server.base_model, rank=1, train_mlp=False))
    assert trainer.get_info().lora_rank == 1
    session = client.holder.get_session_id()
    client.close("success", detail="done").result(WAIT_S)
    beat = server.post("session_heartbeat", {"session_id": session})
    assert beat.status == 410, "the SDK stops its heartbeat then"
    refused = server.post("create_model", {"session_id": session, "model_seq_id": 9, "base_model": "x"})
    assert 400 <= refused.status < 500 and refused.status not in (408, 409, 429), "the SDK would send those again"
