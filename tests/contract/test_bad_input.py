"""What a user is told when something is wrong, and that model and client stay usable.

Each case does one wrong thing with the stock SDK and checks the words that matter. All messages go into bad_input.md,
which is compared whole: after a change, run with UPDATE_BAD_INPUT=1 and look at the difference.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serving
import tinker
import torch

from tinker_hpc.gateway.checkpoints import TinkerPath

pytestmark = pytest.mark.slow

WAIT_S = 60
LIST = Path(__file__).with_name("bad_input.md")
SEEN: dict[str, str] = {}
VOCAB, CONTEXT = 1024, 1024  # of tests/models/tiny-qwen3


def data(n: int = 4, *, tokens: list[int] | None = None, without: str = "", **changed: Any) -> list[tinker.Datum]:
    """One datum of [n], with loss inputs changed, added or left out."""
    inputs: dict[str, Any] = {"target_tokens": [5] * n, "weights": [1.0] * n, **changed}
    inputs.pop(without, None)
    return [tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens or [5] * n), loss_fn_inputs=inputs)]


def policy(without: str = "", **changed: Any) -> list[tinker.Datum]:
    """The same for a policy loss."""
    inputs: dict[str, Any] = {"target_tokens": [5] * 4, "logprobs": [-1.0] * 4, "advantages": [1.0] * 4, **changed}
    inputs.pop(without, None)
    return [tinker.Datum(model_input=tinker.ModelInput.from_ints([5] * 4), loss_fn_inputs=inputs)]


def floats(*values: float) -> tinker.TensorData:
    return tinker.TensorData(data=list(values), dtype="float32", shape=[len(values)])


Train = Callable[[tinker.TrainingClient], Any]


def a_pass(datums: list[tinker.Datum], loss: Any = "cross_entropy", config: Any = None) -> Train:
    return lambda client: client.forward_backward(datums, loss, config)


TRAINING: dict[str, tuple[Train, str]] = {
    "missing loss input": (a_pass(data(without="weights")), "lacks weights: loss_fn 'cross_entropy' needs"),
    "loss input of another loss": (a_pass(data(advantages=[1.0] * 4)), "which loss_fn 'cross_entropy' does not use"),
    "shapes that do not match": (a_pass(data(weights=[1.0] * 3)), "['weights'] has shape [3], expected [4]"),
    "targets of another length": (a_pass(data(target_tokens=[1, 2, 3])), "has shape [3] beside a model_input of 4"),
    "one weight for two targets": (a_pass(data(target_tokens=[[1, 2]] * 4)), "has shape [4], expected [4, 2]"),
    "two targets a position, and one": (
        a_pass(data(target_tokens=[[1, 2]] * 4, weights=[[1.0, 1.0]] * 4) + data()),
        "every token needs as many targets",
    ),
    "two targets a position for a policy loss": (
        a_pass(policy(target_tokens=[[1, 2]] * 4), "ppo"),
        "one target per position, shape [4]",
    ),
    "NaN in a loss input": (a_pass(data(weights=floats(1.0, math.nan, 1.0, 1.0))), "['weights'][1] is nan"),
    "infinity in a loss input": (a_pass(data(weights=floats(1.0, 1.0, 1.0, math.inf))), "['weights'][3] is inf"),
    "token id beyond the vocabulary": (a_pass(data(tokens=[1, 2, VOCAB, 3])), f"is token id {VOCAB}"),
    "target id beyond the vocabulary": (a_pass(data(target_tokens=[1, 2, 3, 10**6])), "is token id 1000000"),
    "target -100": (a_pass(data(target_tokens=[1, 2, 3, -100])), "set its weight to 0"),
    "sequence over the context": (a_pass(data(CONTEXT + 1)), f"{CONTEXT + 1} tokens, more than the context"),
    "empty sequence": (
        a_pass([tinker.Datum(model_input=tinker.ModelInput.empty(), loss_fn_inputs={})]),
        "model_input is empty",
    ),
    "an image": (
        a_pass(
            [
                tinker.Datum(
                    model_input=tinker.ModelInput(chunks=[tinker.types.ImageChunk(data=b"x", format="png")]),
                    loss_fn_inputs={},
                )
            ]
        ),
        "reads text only",
    ),
    "unknown loss": (a_pass(data(), "crossentropy"), "unknown loss_fn 'crossentropy'"),
    "policy loss without sampling logprobs": (a_pass(policy(without="logprobs"), "dro"), "lacks logprobs"),
    "stable_reinforce": (a_pass(data(), "stable_reinforce"), "loss_fn='importance_sampling'"),
    "unknown loss_fn_config key": (a_pass(data(), "cross_entropy", {"beta": 0.1}), "loss_fn_config has 'beta'"),
    "text in loss_fn_config": (a_pass(policy(), "dro", {"beta": "0.1"}), "expected a finite number (default 0.05)"),
    "clip bounds around 0": (
        a_pass(policy(), "ppo", {"clip_low_threshold": 0.2, "clip_high_threshold": -0.2}),
        "they are 0.8 and 1.2",
    ),
    "negative learning rate": (
        lambda client: client.optim_step(tinker.AdamParams(learning_rate=-1.0)),
        "AdamParams.learning_rate is -1.0",
    ),
    "eps of 0": (lambda trainer: trainer.optim_step(tinker.AdamParams(eps=0.0)), "expected 1e-30 or more"),
    "NaN in AdamParams": (
        lambda client: client.optim_step(tinker.AdamParams(learning_rate=math.nan)),
        "AdamParams.learning_rate is nan",
    ),
    "beta1 of 1": (lambda client: client.optim_step(tinker.AdamParams(beta1=1.0)), "expected 0 <= beta1 < 1"),
    "another optimizer": (
        lambda client: client.optim_step(tinker.types.DimuonParams(learning_rate=1e-3)),
        "'dimuon'; this version has AdamW",
    ),
    "path as checkpoint name": (lambda client: client.save_state("../../escape"), "no slashes"),
    "ttl of a minute": (lambda client: client.save_state("short", ttl_seconds=60), "ttl_seconds is 60"),
    "age encryption": (
        lambda client: client.save_weights_external("x", age_encryption_recipients=["age1x"]),
        "age_encryption_recipients is not offered",
    ),
}

Serve = Callable[[tinker.ServiceClient, serving.Service], Any]


def lora(**fields: Any) -> Serve:
    return lambda client, service: client.create_lora_training_client(**{"base_model": service.base_model, **fields})


def resume(path: str, **fields: Any) -> Serve:
    return lambda client, service: client.create_training_client_from_state(path, **fields)


CREATING: dict[str, tuple[Serve, str]] = {
    "unknown base model": (lora(base_model="Nobody/Nothing"), "unknown base model 'Nobody/Nothing': this run serves"),
    "rank 0": (lora(rank=0), "LoRA rank is 0; Tinker takes powers of two"),
    "odd rank": (lora(rank=7), "LoRA rank is 7; Tinker takes powers of two"),
    "rank beyond the hidden size": (lora(rank=256), "Take at most 128"),
    "negative seed": (lora(seed=-1), "seed is -1"),
    "dimuon": (lora(optimizer=tinker.types.DimuonOptimizerConfig()), "optimizer 'dimuon' is not offered"),
    "state that does not exist": (resume("tinker://s-1:train:0/weights/none"), "no checkpoint tinker://s-1:train:0"),
    "state path that leads out": (resume("tinker://s-1:train:0/weights/../../../etc"), "three parts"),
    "something that is no tinker path": (resume("/home/me/checkpoint"), "expected tinker://<model id>/weights/<name>"),
    "sampler of an unknown base model": (
        lambda client, service: client.create_sampling_client(base_model="Nobody/Nothing"),
        "unknown base model",
    ),
    "sampler of a path that does not exist": (
        lambda client, service: client.create_sampling_client(model_path="tinker://s-1:train:0/sampler_weights/none"),
        "no checkpoint",
    ),
}


def asking(tokens: list[int] | None = None, n: int = 1, params: dict[str, Any] | None = None, **more: Any):
    prompt = tinker.ModelInput.from_ints([5, 6] if tokens is None else tokens)
    return lambda client: client.sample(prompt, n, tinker.SamplingParams(**(params or {"max_tokens": 2})), **more)


SAMPLING: dict[str, tuple[Callable[[tinker.SamplingClient], Any], str]] = {
    "empty prompt": (asking([]), "the prompt is empty"),
    "prompt id beyond the vocabulary": (asking([1, VOCAB]), f"prompt[1] is token id {VOCAB}"),
    "prompt over the context": (asking([5] * CONTEXT), "no room for a new token"),
    "prompt and max_tokens over the context": (asking(params={"max_tokens": CONTEXT}), f"Use max_tokens={CONTEXT - 2}"),
    "max_tokens 0": (asking(params={"max_tokens": 0}), "max_tokens is 0"),
    "no samples": (asking(n=0), "num_samples is 0"),
    "negative temperature": (asking(params={"temperature": -1.0}), "expected 0 (greedy), or 1e-06 or more"),
    "top_p 0": (asking(params={"top_p": 0.0}), "expected 0 < top_p <= 1"),
    "top_k 0": (asking(params={"top_k": 0}), "or -1 for no limit"),
    "more candidates than tokens": (asking(topk_sample_logprobs=VOCAB + 1), f"expected 0 (off) to {VOCAB}"),
}


def said(error: BaseException) -> str:
    """The gateway's own words in what the SDK raised."""
    if isinstance(error, tinker.RequestFailedError):
        return re.sub(r"^Request failed: | for self\.request_id=.*$", "", error.message, flags=re.DOTALL)
    if isinstance(error, tinker.APIStatusError):
        return error.body["error"] if isinstance(error.body, dict) else str(error)
    return str(error)


def note(case: str, kind: str, message: str) -> None:
    """Collect a message, without what differs from machine to machine."""
    message = message.replace(str(serving.TINY), "tests/models/tiny-qwen3")
    message = re.sub(r"\S*?/root(?=[/ .:;])", "<data root>", message)
    for pattern, word in (
        (r"contract-\d{8}-[0-9a-f]{6}", "<run>"),
        (r"s-\d{8}-[0-9a-f]{12}[:_]train[:_]\d+", "<model>"),
        (r"pid \d+", "pid <pid>"),
        (r"port \d+", "port <port>"),
        (r"(checksum|says) [0-9a-f]{8}", r"\1 <crc32>"),
        (r"\d+ bytes", "<n> bytes"),
        (r"byte \d+", "byte <n>"),
        (r"\d+ are there", "<n> are there"),
        (r"written with \d+", "written with <n>"),
    ):
        message = re.sub(pattern, word, message)
    SEEN[case] = f"| {case} | {kind} | {message.strip().replace('|', chr(92) + '|')} |"


def kind_of(error: BaseException) -> str:
    if isinstance(error, tinker.RequestFailedError):
        return f"RequestFailedError, category {error.category.value}"
    if isinstance(error, tinker.APIStatusError):
        return f"{type(error).__name__}, HTTP {error.status_code}"
    return type(error).__name__


def check(case: str, act: Callable[[], Any], words: str) -> BaseException:
    with pytest.raises((tinker.TinkerError, ValueError)) as caught:
        act()
    assert words in said(caught.value)
    note(case, kind_of(caught.value), said(caught.value))
    return caught.value


@pytest.fixture(scope="module")
def trainer(service, service_client) -> tinker.TrainingClient:
    """One client for all wrong training requests: each must leave it usable for the next."""
    return service_client.create_lora_training_client(base_model=service.base_model, rank=4, seed=1).result(WAIT_S)


@pytest.fixture(scope="module")
def sampler(service, service_client) -> tinker.SamplingClient:
    return service_client.create_sampling_client(base_model=service.base_model).result(WAIT_S)


@pytest.mark.parametrize("case", TRAINING)
def test_wrong_training_requests(trainer, case):
    act, words = TRAINING[case]
    error = check(case, lambda: act(trainer).result(WAIT_S), words)
    assert isinstance(error, tinker.RequestFailedError)
    assert error.category is tinker.types.RequestErrorCategory.User


def test_the_model_is_usable_after_all_of_them(trainer):
    passed = trainer.forward_backward(data(), "cross_entropy")
    trainer.optim_step(tinker.AdamParams()).result(WAIT_S)
    assert math.isfinite(passed.result(WAIT_S).metrics["loss:sum"])


@pytest.mark.parametrize("case", CREATING)
def test_wrong_creations(service, service_client, case):
    act, words = CREATING[case]
    check(case, lambda: act(service_client, service).result(WAIT_S), words)


@pytest.mark.parametrize("case", SAMPLING)
def test_wrong_samples(sampler, case):
    act, words = SAMPLING[case]
    error = check(case, lambda: act(sampler).result(WAIT_S), words)
    assert isinstance(error, tinker.RequestFailedError)
    assert sampler.compute_logprobs(tinker.ModelInput.from_ints([5, 6])).result(WAIT_S)[0] is None


def test_damaged_and_foreign_checkpoints(service, service_client):
    trainer = service_client.create_lora_training_client(base_model=service.base_model, rank=4, seed=1).result(WAIT_S)
    state = trainer.save_state("damaged").result(WAIT_S).path
    weights = trainer.save_weights_for_sampler("weights").result(WAIT_S).path
    create = service_client.create_training_client_from_state_with_optimizer
    check("sampler weights resumed with optimizer", lambda: create(weights).result(WAIT_S), "has no optimizer state")
    again = check(
        "sampler weights under a name that is taken",
        lambda: trainer.save_weights_for_sampler("weights").result(WAIT_S),
        "exists already, saved at step 0. Save under another name.",
    )
    assert "overwrite" not in str(again), "the SDK has no such argument here"
    assert service.run is not None
    folder = TinkerPath.parse(state).folder(service.run.data_root)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    check("checkpoint with a changed byte", lambda: create(state).result(WAIT_S), "fails its checksum")
    file.write_bytes(whole[:-1])
    check("checkpoint cut short", lambda: create(state).result(WAIT_S), "was written with")
    file.write_bytes(whole)
    create(state).result(WAIT_S)
    (folder / "checkpoint.json").unlink()
    check("checkpoint without checkpoint.json", lambda: create(state).result(WAIT_S), "checkpoint.json is missing")
    shutil.rmtree(folder)


def test_wrong_keys(service):
    def connect(key: str) -> Any:
        return tinker.ServiceClient(base_url=service.base_url, api_key=key).holder

    error = check("wrong key", lambda: connect("tml-of-another-run"), "wrong or missing API key")
    assert isinstance(error, tinker.AuthenticationError)
    check("key that is none of Tinker's", lambda: connect("sk-something"), "tml-")


# --- losses of the user's own, run on the server ------------------------------------------------------------------

UPLOADS: dict[str, tuple[Callable[..., Any], str]] = {
    "custom loss: random numbers": (
        lambda logprobs, weights: ((logprobs * torch.rand_like(weights)).sum(), {}),
        "'torch.rand_like' is not on the list of allowed functions",
    ),
    "custom loss: an attribute": (lambda logprobs, weights: (logprobs.grad_fn.sum(), {}), "the attribute 'grad_fn'"),
    "custom loss: in place": (
        lambda logprobs, weights: (logprobs.mul_(weights).sum(), {}),
        "'mul_' is not on the list",
    ),
    "custom loss: a giant constant": (lambda logprobs, weights: ((logprobs * 2**40).sum(), {}), "is beyond 2147483648"),
    "custom loss: a long constant": (
        lambda logprobs, weights: (torch.stack([logprobs * i for i in range(100)]).sum(), {}),
        "a constant has 100 entries",
    ),
    "custom loss: too many nodes": (
        lambda logprobs, weights: (sum(logprobs * i for i in range(600)).sum(), {}),
        "nodes, at most 512 are taken",
    ),
}
RUNS: dict[str, tuple[Callable[..., Any], str]] = {
    "custom loss: a shape bomb": (
        lambda logprobs, weights: ((logprobs[:, None].expand(-1, 2**28) + weights[0]).sum(), {}),
        "1073741824 elements, at most 16777216 are computed",
    ),
    "custom loss: no scalar": (lambda logprobs, weights: (logprobs * weights, {}), "must return a scalar loss"),
    "custom loss: detached": (lambda logprobs, weights: (logprobs.detach().sum(), {}), "does not depend on logprobs"),
    "custom loss: shapes that do not match": (
        lambda logprobs, weights: ((logprobs[1:] * weights).sum(), {}),
        "Shapes of its tensors: [3], [4]",
    ),
    "custom loss: an infinite gradient": (
        lambda logprobs, weights: (torch.log(weights * logprobs * 0).sum(), {}),
        "nothing was added. Look for log(0)",
    ),
}


def test_wrong_custom_losses(service):
    client = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    trainer = client.create_lora_training_client(base_model=service.base_model, rank=4, seed=1).result(WAIT_S)

    def upload(function: Callable[..., Any]) -> Any:
        return client.create_custom_loss(function, {"logprobs": 1, "weights": 1}).result(WAIT_S)

    for case, (function, words) in UPLOADS.items():
        check(case, lambda function=function: upload(function), words)
    for case, (function, words) in RUNS.items():
        handle = upload(function)
        error = check(case, lambda handle=handle: trainer.forward_backward_custom(data(), handle).result(WAIT_S), words)
        assert isinstance(error, tinker.RequestFailedError)
        assert error.category is tinker.types.RequestErrorCategory.User
    unknown = {"loss_id": "loss-of-another-run"}
    check(
        "custom loss: not uploaded here",
        lambda: trainer.forward_backward(data(), "custom", unknown).result(WAIT_S),
        "unknown custom loss 'loss-of-another-run'",
    )
    assert trainer.optim_step(tinker.AdamParams()).result(WAIT_S).metrics["grad_norm:mean"] == 0.0


# --- the disk, and the files on it ------------------------------------------------------------------------------


def optim_step(service: serving.Service, model_id: str) -> serving.Reply:
    return service.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})


def a_model(service: serving.Service) -> str:
    session = service.post("create_session", {}).json["session_id"]
    ask = {"session_id": session, "model_seq_id": 0, "base_model": service.base_model, "lora_config": {"rank": 4}}
    return service.post("create_model", ask).json["model_id"]


@pytest.mark.parametrize("case", ["full disk under the data root", "data root turned read-only"])
def test_disks(tmp_path, case):
    with serving.small_disk(tmp_path / "root", "1m") as remount, serving.processes_in(tmp_path) as processes:
        run, _ = serving.new_run(tmp_path / "root")
        service = serving.start_gateway(processes, run)
        model_id = a_model(service)
        if case.startswith("full"):
            with (tmp_path / "root" / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        else:
            remount("ro")
        reply = optim_step(service, model_id)
        assert reply.status == 503
        note(case, "sent again for 5 minutes, then InternalServerError, HTTP 503", reply.json["error"])
        if case.startswith("data root"):
            processes.stop("gateway")
            dead = processes.start("dead", "-m", "tinker_hpc.gateway", "--run-dir", str(run.path))
            assert dead.wait(WAIT_S) == 1
            note("gateway started on a read-only data root", "exit code 1, stderr", processes.log("dead"))


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_damaged_logs(alone, processes, how):
    assert alone.run is not None
    worker = alone.run.worker(0)
    model_id = a_model(alone)
    processes.stop("gateway")
    serving.start_responder(processes, worker)
    serving.wait_for(lambda: len(list(worker.results.rglob("seg-*"))) >= 2, WAIT_S, "the result")
    serving.damage(worker.results, how)
    again = serving.start_gateway(processes, alone.run)
    serving.wait_for(lambda: retrieve(again, model_id).status == 200, WAIT_S, "an answer")
    answer = retrieve(again, model_id).json
    note(f"result segment {how}", f"RequestFailedError, category {answer['category']}", answer["error"])
    processes.stop("gateway")
    serving.damage(worker.requests, how)
    dead = processes.start("dead", "-m", "tinker_hpc.gateway", "--run-dir", str(alone.run.path))
    assert dead.wait(WAIT_S) == 1
    note(f"request segment {how}, gateway started", "exit code 1, stderr", processes.log("dead"))


def retrieve(service: serving.Service, model_id: str) -> serving.Reply:
    return service.post("retrieve_future", {"request_id": f"{model_id}:0"})


def test_the_list_is_current():
    """bad_input.md holds exactly these messages."""
    expected = len(TRAINING) + len(CREATING) + len(SAMPLING) + len(UPLOADS) + len(RUNS) + 15
    if len(SEEN) < expected and not os.environ.get("CI"):
        pytest.skip("not all cases ran: pytest tests/contract/test_bad_input.py")
    assert len(SEEN) == expected
    head = (
        "# What a user is told\n\nMade by `tests/contract/test_bad_input.py` from the stock SDK, a gateway and a "
        "worker; `<...>` stands for what differs.\nAfter each of these the client and the model are usable, but where "
        "a process ended.\n\n| done | seen as | message |\n|---|---|---|\n"
    )
    text = head + "\n".join(SEEN.values()) + "\n"
    if os.environ.get("UPDATE_BAD_INPUT") or not LIST.exists():
        LIST.write_text(text)
    assert LIST.read_text() == text, "UPDATE_BAD_INPUT=1 writes it anew; then look at git diff"
