"""submit(): from a function or a command to a job in the queue, with a run folder that says all about it.

Whatever can be refused is refused before the job queues, and then no run is left behind.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from launch.job_spec import JobSpec
from tinker_hpc.base_models import resolve
from tinker_hpc.config import ClusterProfile, Config, check_environment, load_config
from tinker_hpc.errors import ConfigError, SlurmUnavailableError, SubmissionError
from tinker_hpc.payload import dump_call
from tinker_hpc.private_files import write_bytes
from tinker_hpc.resources import Resources, base_model_names, build_job_spec, check_run_name, driver_spec
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.runs import Run

Driver = Literal["together", "separate"]


def submit(
    function: Callable[..., Any],
    /,
    *args: Any,
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
    driver: Driver = "together",
    name: str | None = None,
    environment: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Run:
    """Run `function(*args, **kwargs)` as the loop of a job that also serves `base_model`. Returns at once.

    The function is an ordinary Tinker program (plain or async): inside it, `tinker.ServiceClient()` finds the model.
    It travels by cloudpickle, its return value and exception come back by `Run.result()`.

    The keywords named here are submit's own; every other keyword goes to the function. A function with a parameter
    of such a name takes it by position, or bound by functools.partial.

    Args:
        base_model: hub name or folder of the model to serve. Several: each gets a worker, that is a job, of its own
            and of this size; the first one's job carries the loop.
        cluster: a profile's name. None: the configuration's default; "local" means this machine.
        nodes, gpus_per_node, ranks_per_node, cpus_per_node, memory, time, tp_size, pp_size, ep_size: see
            `resources.Resources`.
        driver: "separate" runs the loop in a small CPU job of its own (in the profile's `driver_partition`), so that
            a preempted GPU job costs the loop nothing but time. "together": on the worker's first node.
        name: start of the run's id. None: the function's name.
        environment: variables set in the job.

    Raises:
        SerializationError: something the function uses does not pickle; names it.
        ConfigError: unknown cluster or model, sizes that cannot go together, arguments that do not fit the function.
        SubmissionError: the scheduler refused, with its words.
        SlurmUnavailableError: it could not be reached, or did not answer; the message says how to go on.
    """
    ours = {
        "base_model": base_model,
        "cluster": cluster,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
        "cpus_per_node": cpus_per_node,
        "memory": memory,
        "time": time,
        "tp_size": tp_size,
        "pp_size": pp_size,
        "ep_size": ep_size,
        "driver": None if driver == "together" else driver,
        "name": name,
        "environment": environment,
    }
    check_call(function, args, kwargs, ours)
    payload = dump_call(function, args, kwargs)
    function_name = getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", "run")
    return submit_loop(
        base_models=base_model_names(base_model),
        cluster=cluster,
        resources=Resources(
            nodes, gpus_per_node, ranks_per_node, cpus_per_node, memory, time, tp_size, pp_size, ep_size
        ),
        name=check_run_name(name, otherwise=function_name),
        payload=payload,
        environment=environment,
        driver=driver,
    )


def submit_loop(
    *,
    base_models: Sequence[str],
    cluster: str | None,
    resources: Resources,
    name: str,
    payload: bytes | None = None,
    command: tuple[str, ...] | None = None,
    environment: Mapping[str, str] | None = None,
    driver: Driver = "together",
    config: Config | None = None,
) -> Run:
    """Submit a run whose loop is a pickled call or a command; `submit` and `tinker-hpc run` are made of it."""
    from launch.further_workers import cancel_worker_runs
    from launch.submit import submit as submit_job

    config = config or load_config()
    folder = RunFolder.new(config.data_root, name)
    try:
        specs = job_specs(
            base_models,
            profile=config.profile(cluster),
            config=config,
            resources=resources,
            run_id=folder.run_id,
            name=name,
            command=command,
            environment=environment,
            driver=driver,
        )
        if payload is not None:
            write_bytes(folder.payload, payload)
    except BaseException:  # whatever it is, a Ctrl-C while a model is downloaded too: nothing is submitted yet
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    try:
        # The run itself last: its gateway then knows all its workers, and a refusal leaves no loop without a model.
        for spec in reversed(specs):
            worker = spec.run_id.removeprefix(f"{folder.run_id}-w")
            submit_job(spec, folder.add_worker_run(int(worker)) if spec.serves_run else folder)
    except (ConfigError, SubmissionError, SlurmUnavailableError) as error:
        if not getattr(error, "job_may_exist", False):  # no job, so no run
            cancel_worker_runs(folder)
            for part in [*folder.worker_runs(), folder]:
                shutil.rmtree(part.path, ignore_errors=True)
        raise
    return Run(folder.run_id, config=config)


def job_specs(
    base_models: Sequence[str],
    *,
    profile: ClusterProfile,
    config: Config,
    resources: Resources,
    run_id: str,
    name: str,
    command: tuple[str, ...] | None = None,
    environment: Mapping[str, str] | None = None,
    driver: Driver = "together",
    weights: bool = True,
) -> list[JobSpec]:
    """The jobs of a run: the first carries gateway, loop and the first model's worker, the others a worker each.
    With a separate driver the first carries gateway and loop alone. Without `weights` config.json is enough.

    Raises: ConfigError for no or the same base model twice, variables that cannot be set, or sizes that cannot go
        together; UnknownBaseModelError.
    """
    if not base_models:
        raise ConfigError("no base model; name at least one.")
    if driver not in ("together", "separate"):
        raise ConfigError(f'driver is {driver!r}; it must be "together" (on the worker\'s node) or "separate".')
    check_environment(environment or {})
    separate = driver == "separate"
    models = [resolve(asked, config.base_models, weights=weights) for asked in base_models]
    specs: list[JobSpec] = []
    for index, (asked, model) in enumerate(zip(base_models, models, strict=True)):
        if model.folder in [earlier.folder for earlier in models[:index]]:
            raise ConfigError(
                f"base model {asked!r} is named twice (folder {model.folder}). One worker serves any number of "
                "adapters and loops; name each base model once."
            )
        specs.append(
            build_job_spec(
                resources,
                profile=profile,
                base_model=model,
                asked_base_model=asked,
                run_id=run_id if index == 0 and not separate else f"{run_id}-w{index}",
                kind="run" if index == 0 and not separate else "session",
                name=name,
                command=command if index == 0 and not separate else None,
                environment=environment,
                serves_run=None if index == 0 and not separate else run_id,
                per_expert=config.expert_lora == "per_expert",
            )
        )
    return [driver_spec(specs[0], run_id=run_id, command=command), *specs] if separate else specs


def check_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Refuse a call that the function would refuse in the job, or that could be read in two ways (pure).

    Raises: ConfigError naming the parameter.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not callable, or a builtin without a signature: dump_call or the job says so
        return
    named = getattr(function, "__name__", repr(function))
    bound = signature.bind_partial(*args).arguments if _fits(signature, args) else {}
    preset = function.keywords if isinstance(function, functools.partial) else {}
    for parameter in signature.parameters.values():
        free = parameter.name not in bound and parameter.name not in preset
        by_keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if free and by_keyword and ours.get(parameter.name) is not None:
            raise ConfigError(
                f"{named}() has a parameter {parameter.name!r}, and submit() keeps that keyword for itself. Pass "
                f"{named}'s own by position, or bind it: submit(functools.partial({named}, {parameter.name}=...), ...)."
            )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"the arguments do not fit {named}{signature}: {error}. submit() keeps these keywords for itself: "
            f"{', '.join(ours)}; all others go to the function."
        ) from error


def _fits(signature: inspect.Signature, args: tuple[Any, ...]) -> bool:
    try:
        signature.bind_partial(*args)
    except TypeError:
        return False
    return True
