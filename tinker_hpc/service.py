"""Step 2 of a request. Before: the user's loop. After: the stock SDK, then gateway/app.py.

The stock `tinker.ServiceClient`, pointed at a gateway: the one of TINKER_BASE_URL (inside a run it is set), else one
that is started here, with a worker as soon as a base model is named.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tinker

from launch.loop_start.sitecustomize import end_the_sdks_requests
from tinker_hpc.resources import Resources, base_model_names
from tinker_hpc.sessions import Session

_LOOPBACK = ("127.0.0.1", "localhost")

atexit.register(end_the_sdks_requests)  # a program with a session of its own should end as one in a run does


class ServiceClient(tinker.ServiceClient):
    """The stock ServiceClient, on your own cluster.

    With `base_url` or TINKER_BASE_URL it is the stock client and nothing else. Without, it uses this process's session
    (cluster and sizes from the configuration), which is started at once, gets a worker job when a base model is named,
    and ends with the process. For other sizes, or an earlier end: `with tinker_hpc.session(...) as service`.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        session: Session | None = None,
        **kwargs: Any,
    ) -> None:
        if session is None and base_url is None and not os.environ.get("TINKER_BASE_URL"):
            session = default_session()
        self._hpc_session = session
        if session is not None:
            say_at_once_why_it_waits()
            base_url, api_key = session.base_url, session.api_key
            bypass_proxy(os.environ)
        given: dict[str, Any] = {"base_url": base_url, "api_key": api_key}
        # tinker 0.25 takes these as **kwargs and asks its environment only where they are absent.
        given = {name: value for name, value in given.items() if value is not None}
        super().__init__(user_metadata, project_id, **given, **kwargs)


def say_at_once_why_it_waits() -> None:
    """Let the SDK log why training waits from the beginning. tinker 0.38 first keeps it to itself for a quarter of an
    hour: short pauses are a cloud's own affair, but a Slurm queue is the user's.
    """
    with contextlib.suppress(ImportError):  # older SDKs have no such module, or no such constant in it
        logger = importlib.import_module("tinker.lib.queue_state_logger")
        if hasattr(logger, "PAUSE_GRACE_PERIOD"):
            setattr(logger, "PAUSE_GRACE_PERIOD", 0)  # noqa: B010  not a public name


def _serving_first(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stock`, a method that names a base model or a checkpoint, after making sure a worker for it is on its way."""
    signature = inspect.signature(stock)

    def serve(client: ServiceClient, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        session = client._hpc_session
        if session is None:
            return
        named = signature.bind_partial(client, *args, **kwargs).arguments
        path = named.get("model_path") or named.get("path")
        if named.get("base_model"):
            session.serve(named["base_model"])
        elif path:
            session.serve_checkpoint(path)

    if inspect.iscoroutinefunction(stock):

        @functools.wraps(stock)
        async def create_async(self: ServiceClient, *args: Any, **kwargs: Any) -> Any:
            await asyncio.to_thread(serve, self, args, kwargs)
            return await stock(self, *args, **kwargs)

        return create_async

    @functools.wraps(stock)
    def create(self: ServiceClient, *args: Any, **kwargs: Any) -> Any:
        serve(self, args, kwargs)
        return stock(self, *args, **kwargs)

    return create


# By name, not by hand: which of these exist, and which are coroutines, depends on the SDK's version.
for _name in (
    "create_lora_training_client",
    "create_training_client_from_state",
    "create_training_client_from_state_with_optimizer",
    "create_sampling_client",
):
    for _variant in (_name, f"{_name}_async"):
        if hasattr(tinker.ServiceClient, _variant):
            setattr(ServiceClient, _variant, _serving_first(getattr(tinker.ServiceClient, _variant)))


@contextlib.contextmanager
def session(
    *,
    base_model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    cluster: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    ranks_per_node: int | None = None,
    cpus_per_node: int | None = None,
    memory: str | None = None,
    time: str | int | None = None,
    tp_size: int | None = None,
    pp_size: int | None = None,
    ep_size: int | None = None,
    name: str | None = None,
) -> Iterator[ServiceClient]:
    """A ServiceClient with a worker of its own, for a notebook or a script; the loop stays here.

    The worker's job is submitted at once; the block starts without waiting for it, requests wait in the log. On the
    way out, by whatever exception, the job and the gateway are ended.

    Args: as `tinker_hpc.submit`.
    Raises: UnknownBaseModelError, UnknownClusterError, ConfigError, SubmissionError, SessionError.
    """
    base_models = base_model_names(base_model)
    resources = Resources(nodes, gpus_per_node, ranks_per_node, cpus_per_node, memory, time, tp_size, pp_size, ep_size)
    with Session(cluster=cluster, resources=resources, name=name) as running:
        for served in base_models:
            running.serve(served)
        client = ServiceClient(session=running)
        ended = "errored"
        try:
            yield client
            ended = "success"
        except KeyboardInterrupt:
            ended = "interrupted"
            raise
        finally:
            close_client(client, ended)


def close_client(client: ServiceClient, status: str) -> None:
    """Let the SDK say goodbye to the gateway, if this version does; the session ends either way."""
    close = getattr(client, "close", None)
    if close is None:  # before tinker 0.28
        return
    with contextlib.suppress(Exception):  # an error here would hide the one the user is leaving with
        close(status).result(timeout=5)


_default_lock = threading.Lock()
_default: list[Session] = []


def default_session() -> Session:
    """This process's session, started when first asked for and closed when the process ends."""
    with _default_lock:
        if not _default or _default[0].closed:
            _default[:] = [Session()]
            atexit.register(_default[0].close)
        return _default[0]


def bypass_proxy(environ: Any) -> None:
    """Keep requests to the loopback address away from a site's web proxy, where they would hang for minutes."""
    for variable in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in environ.get(variable, "").split(",") if host]
        environ[variable] = ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
