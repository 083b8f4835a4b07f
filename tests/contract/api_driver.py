"""Calls every public method of the SDK's four clients against a gateway; any SDK from 0.25 on.

`python api_driver.py BASE_MODEL` prints one JSON line {"version": ..., "outcomes": {"Class.method": outcome}}, where an
outcome is "works" (called, and what came back was checked), "works: REMARK", "refused: SENTENCE" (the server's own
words), or "failed: TRACEBACK". Methods are found by introspection: one that nothing here calls is "unknown".
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any

os.environ["TINKER_PROJECT_ID"] = "project-of-the-table"

import tinker
from tinker.lib.public_interfaces.rest_client import RestClient

WAIT_S = 120
CLASSES = (tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient, RestClient)
WHO = {"who": f"table-{os.getpid()}"}  # nobody else's: the gateway may have been asked by another SDK before
TOKENS = [5, 6, 7]
PROMPT = tinker.ModelInput.from_ints(TOKENS)
GREEDY = tinker.SamplingParams(max_tokens=2, temperature=0, stop=[])
DATA = [
    tinker.Datum(model_input=PROMPT, loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0, 1.0, 1.0]}),
]
CONSOLE = "the SDK makes it up itself; it names Tinker's own console"


def done(value: Any) -> Any:
    """Old versions return clients and results where new ones return futures of them."""
    return value.result(timeout=WAIT_S) if hasattr(value, "result") else value


class Scene:
    """What the calls need. `call` calls the method under test, in its plain or its `_async` form."""

    def __init__(self, base_model: str) -> None:
        self.base_model = base_model
        self.suffix = ""
        self.service = tinker.ServiceClient(user_metadata=WHO)
        self.trainer = done(self.service.create_lora_training_client(base_model=base_model, rank=4, seed=1))
        self.sampler = done(self.service.create_sampling_client(base_model=base_model))
        self.rest = self.service.create_rest_client()
        self.session_id = self.trainer.model_id.partition(":")[0]
        self._names = 0

    def call(self, client: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        method = getattr(client, name + self.suffix)
        if not self.suffix:
            return done(method(*args, **kwargs))

        async def wait() -> Any:
            return await method(*args, **kwargs)

        return done(asyncio.run(wait()))

    def name(self) -> str:
        self._names += 1
        return f"{WHO['who']}-{self._names}"

    def state(self) -> str:
        return done(self.trainer.save_state(self.name())).path

    def paths(self) -> set[str]:
        return {each.tinker_path for each in done(self.rest.list_checkpoints(self.trainer.model_id)).checkpoints}

    def listed(self, path: str) -> Any:
        found = done(self.rest.list_checkpoints(self.trainer.model_id)).checkpoints
        return next(each for each in found if each.tinker_path == path)


CALLS: dict[str, Callable[[Scene], str | None]] = {}


def of(cls: str, *names: str) -> Any:
    """Register a function as the call of `cls.name` for each of `names` (given to it as `name`)."""

    def register(act: Callable[..., str | None]) -> Any:
        for name in names:
            takes_name = len(inspect.signature(act).parameters) > 1
            CALLS[f"{cls}.{name}"] = (lambda scene, name=name: act(scene, name)) if takes_name else act
        return act

    return register


def learns(client: Any, scene: Scene) -> None:
    """A client that can take a step."""
    before = done(client.forward(DATA, "cross_entropy")).metrics["loss:sum"]
    done(client.forward_backward(DATA, "cross_entropy"))
    done(client.optim_step(tinker.AdamParams(learning_rate=1e-2)))
    assert done(client.forward(DATA, "cross_entropy")).metrics["loss:sum"] < before


def samples(client: Any) -> None:
    (sequence,) = done(client.sample(PROMPT, 1, GREEDY)).sequences
    assert len(sequence.tokens) == len(sequence.logprobs) == 2


# --- ServiceClient ----------------------------------------------------------------------------------------------


@of("ServiceClient", "create_lora_training_client")
def _(s: Scene) -> None:
    client = s.call(s.service, "create_lora_training_client", base_model=s.base_model, rank=2, seed=3)
    assert client.get_info().lora_rank == 2
    learns(client, s)


@of("ServiceClient", "create_training_client_from_state", "create_training_client_from_state_with_optimizer")
def _(s: Scene, name: str) -> None:
    path = s.state()
    expected = done(s.trainer.forward(DATA, "cross_entropy")).metrics["loss:sum"]
    client = s.call(s.service, name, path)
    assert done(client.forward(DATA, "cross_entropy")).metrics["loss:sum"] == expected
    learns(client, s)


@of("ServiceClient", "create_sampling_client")
def _(s: Scene) -> None:
    samples(s.call(s.service, "create_sampling_client", base_model=s.base_model))


@of("ServiceClient", "create_rest_client")
def _(s: Scene) -> None:
    assert done(s.service.create_rest_client().list_sessions()).sessions


@of("ServiceClient", "create_custom_loss")
def _(s: Scene) -> None:
    def halved(logprobs, weights):
        loss = -(logprobs * weights).sum() / 2
        return loss, {"custom/halved:sum": loss}

    handle = s.call(s.service, "create_custom_loss", halved, input_ranks={"logprobs": 1, "weights": 1})
    output = done(s.trainer.forward_backward_custom(DATA, handle))
    done(s.trainer.optim_step(tinker.AdamParams(learning_rate=0.0)))
    plain = done(s.trainer.forward(DATA, "cross_entropy")).metrics["loss:sum"]
    assert abs(output.metrics["custom/halved:sum"] - plain / 2) < 1e-4


@of("ServiceClient", "copy_weights")
def _(s: Scene) -> None:
    copied(s, s.state(), s.service)


@of("ServiceClient", "close")
def _(s: Scene) -> None:
    service = tinker.ServiceClient()
    session = done(service.create_lora_training_client(base_model=s.base_model, rank=1)).model_id.partition(":")[0]
    s.call(service, "close", "errored", detail="on purpose")
    if not hasattr(tinker.types, "SessionSearchRequest"):  # older ones cannot ask how a session ended
        return
    query = tinker.types.SessionSearchRequest(session_id=session)
    (found,) = done(s.rest.search_sessions(query)).sessions
    assert found.status.reason.type == "errored" and found.status.detail == "on purpose"


@of("ServiceClient", "get_server_capabilities")
@of("RestClient", "get_server_capabilities")
def _(s: Scene) -> None:
    for client in (s.service, s.rest):
        if hasattr(client, "get_server_capabilities" + s.suffix):
            (model,) = s.call(client, "get_server_capabilities").supported_models
            assert model.model_name == s.trainer.get_info().model_name and model.max_context_length == 1024


@of("ServiceClient", "get_telemetry")
@of("TrainingClient", "get_telemetry")
@of("SamplingClient", "get_telemetry")
@of("RestClient", "get_telemetry")
def _(s: Scene) -> None:
    for client in (s.service, s.trainer, s.sampler, s.rest):
        assert client.get_telemetry() is None, "TINKER_TELEMETRY=0"


@of("ServiceClient", "get_console_url")
@of("TrainingClient", "get_console_url")
def _(s: Scene) -> str:
    assert all(s.session_id in client.get_console_url() for client in (s.service, s.trainer))
    return CONSOLE


# --- TrainingClient ---------------------------------------------------------------------------------------------


@of("TrainingClient", "forward", "forward_backward")
def _(s: Scene, name: str) -> None:
    output = s.call(s.trainer, name, DATA, "cross_entropy")
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    assert logprobs.shape == (3,) and abs(output.metrics["loss:sum"] + logprobs.sum()) < 1e-4


@of("TrainingClient", "forward_backward_custom")
def _(s: Scene) -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        return -sum(row.sum() for row in logprobs), {"seen": float(len(logprobs))}

    assert s.call(s.trainer, "forward_backward_custom", DATA, loss).metrics["seen"] == 1.0


@of("TrainingClient", "optim_step")
def _(s: Scene) -> None:
    done(s.trainer.forward_backward(DATA, "cross_entropy"))
    assert s.call(s.trainer, "optim_step", tinker.AdamParams(learning_rate=1e-4)).metrics["grad_norm:mean"] > 0


@of("TrainingClient", "save_state")
def _(s: Scene) -> None:
    assert s.call(s.trainer, "save_state", s.name(), ttl_seconds=3600).path in s.paths()


@of("TrainingClient", "save_weights_for_sampler")
def _(s: Scene) -> None:
    path = s.call(s.trainer, "save_weights_for_sampler", s.name()).path
    samples(done(s.service.create_sampling_client(model_path=path)))


@of("TrainingClient", "save_weights_external")
def _(s: Scene) -> None:
    path = s.call(s.trainer, "save_weights_external", s.name(), ttl_seconds=3600).path
    assert "/external_weights/" in path and s.listed(path).checkpoint_type == "external"


@of("TrainingClient", "save_weights_and_get_sampling_client")
def _(s: Scene) -> None:
    samples(s.call(s.trainer, "save_weights_and_get_sampling_client"))


@of("TrainingClient", "create_sampling_client")
def _(s: Scene) -> None:
    samples(s.call(s.trainer, "create_sampling_client", s.state()))


@of("TrainingClient", "load_state", "load_state_with_optimizer")
def _(s: Scene, name: str) -> None:
    path = s.state()
    before = done(s.trainer.forward(DATA, "cross_entropy")).metrics["loss:sum"]
    done(s.trainer.forward_backward(DATA, "cross_entropy"))
    done(s.trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)))
    assert done(s.trainer.forward(DATA, "cross_entropy")).metrics["loss:sum"] != before
    s.call(s.trainer, name, path)
    assert done(s.trainer.forward(DATA, "cross_entropy")).metrics["loss:sum"] == before


@of("TrainingClient", "get_info")
def _(s: Scene) -> None:
    info = s.call(s.trainer, "get_info")
    assert info.is_lora and info.lora_rank == 4 and info.model_id == s.trainer.model_id


@of("TrainingClient", "get_tokenizer")
@of("SamplingClient", "get_tokenizer")
def _(s: Scene) -> None:
    for client in (s.trainer, s.sampler):
        tokenizer = client.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


# --- SamplingClient ---------------------------------------------------------------------------------------------


@of("SamplingClient", "sample")
def _(s: Scene) -> None:
    response = s.call(s.sampler, "sample", PROMPT, 2, GREEDY, include_prompt_logprobs=True)
    assert len(response.sequences) == 2 and response.prompt_logprobs[0] is None


@of("SamplingClient", "compute_logprobs")
def _(s: Scene) -> None:
    logprobs = s.call(s.sampler, "compute_logprobs", PROMPT)
    assert logprobs[0] is None and all(value < 0 for value in logprobs[1:])


@of("SamplingClient", "create")
def _(s: Scene) -> None:
    samples(s.call(tinker.SamplingClient, "create", s.service.holder, base_model=s.base_model))


@of("SamplingClient", "get_base_model")
def _(s: Scene) -> None:
    assert s.call(s.sampler, "get_base_model") == s.trainer.get_info().model_name


@of("SamplingClient", "get_sampler_handle", "from_sampler_handle")
def _(s: Scene) -> None:
    handle = s.sampler.get_sampler_handle()
    samples(tinker.SamplingClient.from_sampler_handle(handle, api_key=os.environ["TINKER_API_KEY"]))


@of("SamplingClient", "on_queue_state_change")
def _(s: Scene) -> None:
    from tinker.lib.api_future_impl import QueueState

    s.sampler.on_queue_state_change(QueueState.PAUSED_CAPACITY, "Slurm PENDING (Priority)")


# --- RestClient -------------------------------------------------------------------------------------------------


@of("RestClient", "get_training_run", "get_training_run_by_tinker_path")
def _(s: Scene, name: str) -> None:
    path = s.state()
    run = s.call(s.rest, name, path if name.endswith("path") else s.trainer.model_id)
    assert (run.training_run_id, run.lora_rank) == (s.trainer.model_id, 4)
    assert run.last_checkpoint.tinker_path == path


@of("RestClient", "list_training_runs")
def _(s: Scene) -> None:
    found = s.call(s.rest, "list_training_runs", limit=100)
    assert s.trainer.model_id in {run.training_run_id for run in found.training_runs}
    assert found.cursor.total_count >= len(found.training_runs)


@of("RestClient", "list_checkpoints", "list_user_checkpoints")
def _(s: Scene, name: str) -> None:
    path = s.state()
    args = (s.trainer.model_id,) if name == "list_checkpoints" else ()
    (mine,) = (each for each in s.call(s.rest, name, *args).checkpoints if each.tinker_path == path)
    assert mine.size_bytes > 0 and mine.expires_at is None and not mine.public


@of("RestClient", "delete_checkpoint", "delete_checkpoint_from_tinker_path")
def _(s: Scene, name: str) -> None:
    path = s.state()
    parts = (path,) if name.endswith("path") else (s.trainer.model_id, path.partition(":train:")[2].partition("/")[2])
    s.call(s.rest, name, *parts)
    assert path not in s.paths()
    try:
        done(s.service.create_training_client_from_state(path))
    except tinker.TinkerError as error:
        assert "no checkpoint" in str(error)
    else:
        raise AssertionError("a deleted checkpoint still loads")


@of("RestClient", "publish_checkpoint_from_tinker_path", "unpublish_checkpoint_from_tinker_path")
def _(s: Scene, name: str) -> None:
    path = s.state()
    if name.startswith("unpublish"):
        done(s.rest.publish_checkpoint_from_tinker_path(path))
    s.call(s.rest, name, path)
    assert s.listed(path).public is not name.startswith("unpublish")
    done(s.rest.unpublish_checkpoint_from_tinker_path(path))


@of("RestClient", "set_checkpoint_ttl_from_tinker_path")
def _(s: Scene) -> None:
    path = s.state()
    s.call(s.rest, "set_checkpoint_ttl_from_tinker_path", path, 7200)
    assert abs(s.listed(path).expires_at.timestamp() - time.time() - 7200) < 60
    s.call(s.rest, "set_checkpoint_ttl_from_tinker_path", path, None)
    assert s.listed(path).expires_at is None


@of("RestClient", "get_weights_info_by_tinker_path")
def _(s: Scene) -> None:
    info = s.call(s.rest, "get_weights_info_by_tinker_path", s.state())
    assert (info.lora_rank, info.base_model) == (4, s.trainer.get_info().model_name)


@of("RestClient", "copy_weights")
def _(s: Scene) -> None:
    copied(s, s.state(), s.rest)


def copied(s: Scene, path: str, client: Any) -> None:
    copy = s.call(client, "copy_weights", path)
    assert copy != path and copy.rpartition("/")[2] == path.rpartition("/")[2]
    expected = done(s.trainer.forward(DATA, "cross_entropy")).metrics["loss:sum"]
    resumed = done(s.service.create_training_client_from_state_with_optimizer(copy))
    assert done(resumed.forward(DATA, "cross_entropy")).metrics["loss:sum"] == expected
    runs = done(s.rest.list_training_runs(project_id="project-of-the-table")).training_runs
    assert copy.removeprefix("tinker://").partition("/")[0] in {run.training_run_id for run in runs}


@of("RestClient", "get_external_weights_urls")
def _(s: Scene) -> None:
    path = done(s.trainer.save_weights_external(s.name())).path
    urls = s.call(s.rest, "get_external_weights_urls", path).urls
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(fetched(urls["adapter_config.json"]))["r"] == 4


@of("RestClient", "get_checkpoint_archive_url", "get_checkpoint_archive_url_from_tinker_path")
def _(s: Scene, name: str) -> None:
    path = done(s.trainer.save_weights_for_sampler(s.name())).path
    parts = (path,) if name.endswith("path") else (s.trainer.model_id, path.partition(":train:")[2].partition("/")[2])
    assert b"adapter_model.safetensors" in fetched(s.call(s.rest, name, *parts).url)


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=WAIT_S) as response:
        return response.read()


@of("RestClient", "list_sessions")
def _(s: Scene) -> None:
    assert s.session_id in s.call(s.rest, "list_sessions", limit=100).sessions


@of("RestClient", "get_session")
def _(s: Scene) -> None:
    session = s.call(s.rest, "get_session", s.session_id)
    assert s.trainer.model_id in session.training_run_ids
    assert getattr(session, "user_metadata", WHO) == WHO, "0.25 does not read it"


@of("RestClient", "search_sessions")
def _(s: Scene) -> None:
    query = tinker.types.SessionSearchRequest(user_metadata=WHO, limit=100)
    (found,) = s.call(s.rest, "search_sessions", query).sessions
    assert found.session_id == s.session_id and found.status.type == "active" and found.checkpoints_count > 0


@of("RestClient", "assign_session_project")
def _(s: Scene) -> None:
    other = tinker.ServiceClient()
    model_id = done(other.create_lora_training_client(base_model=s.base_model, rank=1)).model_id
    project = s.name()
    s.call(s.rest, "assign_session_project", model_id.partition(":")[0], project)
    if "project_id" in inspect.signature(s.rest.list_training_runs).parameters:
        (run,) = done(s.rest.list_training_runs(project_id=project)).training_runs
        assert run.training_run_id == model_id


@of("RestClient", "export_session_trace")
def _(s: Scene) -> None:
    events = json.loads(fetched(s.call(s.rest, "export_session_trace", s.session_id)))["traceEvents"]
    assert {"create_model", "queued"} <= {event["name"] for event in events}


@of("RestClient", "get_sampler")
def _(s: Scene) -> None:
    sampler = done(s.trainer.save_weights_and_get_sampling_client())
    sampler_id = sampler._sampling_session_id
    assert s.call(s.rest, "get_sampler", sampler_id).base_model == s.trainer.get_info().model_name


@of("RestClient", "whoami")
def _(s: Scene) -> None:
    assert s.call(s.rest, "whoami").user_urn.startswith("urn:tinker_hpc:user:")


@of("RestClient", "get_billing_usage")
def _(s: Scene) -> None:
    s.call(s.rest, "get_billing_usage", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")


@of("RestClient", "get_audit_log", "get_current_checkpoint_storage_usage")
def _(s: Scene, name: str) -> None:
    s.call(s.rest, name)


# --- all of them ------------------------------------------------------------------------------------------------


def public_methods() -> list[str]:
    return [
        f"{cls.__name__}.{name}"
        for cls in CLASSES
        for name in sorted(dir(cls))
        if not name.startswith("_") and callable(getattr(cls, name))
    ]


def outcome(scene: Scene, method: str) -> str:
    plain = method.removesuffix("_async")
    if plain not in CALLS:
        return "unknown"
    scene.suffix = "_async" if plain != method else ""
    try:
        remark = CALLS[plain](scene)
    except tinker.RequestFailedError as error:
        return f"refused: {error.message}"
    except tinker.APIStatusError as error:
        words = error.body.get("error") if isinstance(error.body, dict) else None
        return f"refused: {words}" if words and error.status_code < 500 else f"failed: {error}"
    except Exception:
        return f"failed: {traceback.format_exc()}"
    return f"works: {remark}" if remark else "works"


if __name__ == "__main__":
    wanted = re.compile(sys.argv[2] if len(sys.argv) > 2 else "")
    the_scene = Scene(sys.argv[1])
    found = {method: outcome(the_scene, method) for method in public_methods() if wanted.search(method)}
    print(json.dumps({"version": tinker.__version__, "outcomes": found}))
