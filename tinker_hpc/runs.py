"""submit() and Run: a future over a job, found again by its id from any process.

The client may exit after submit(): the loop runs in the job. Everything a Run answers it reads from the run folder
and, where that is silent, from Slurm; it holds no state that another process would lack.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import shutil
import socket
import time as clock
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from launch.job_spec import JobSpec
from tinker_hpc.base_models import resolve
from tinker_hpc.checkpoints import Checkpoint, checkpoints_of_run
from tinker_hpc.config import ClusterProfile, Config, load_config
from tinker_hpc.errors import ConfigError, JobFailedError, LoopFailedError, SlurmUnavailableError, SubmissionError
from tinker_hpc.payload import dump_call, load_outcome
from tinker_hpc.resources import Resources, build_job_spec, check_run_name, driver_spec
from tinker_hpc.run_folder import RunFolder, write_bytes, write_json
from tinker_hpc.run_state import RunStatus, combine, read_events, read_metrics, read_own_files
from tinker_hpc.waiting import LOCAL_PATIENCE, SLURM_PATIENCE, Ended, Waiter

_TAIL_LINES = 20
Driver = Literal["together", "separate"]


def submit(
    function: Callable[..., Any],
    /,
    *args: Any,
    base_model: str | Sequence[str],
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
        base_models=[base_model] if isinstance(base_model, str) else base_model,
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

    Raises: ConfigError for no or the same base model twice, or sizes that cannot go together; UnknownBaseModelError.
    """
    if not base_models:
        raise ConfigError("no base model; name at least one.")
    if driver not in ("together", "separate"):
        raise ConfigError(f'driver is {driver!r}; it must be "together" (on the worker\'s node) or "separate".')
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


class Run:
    """A run by its id: what it does, what it returned, how to end it.

    Args:
        run_id: as `submit` and `tinker-hpc ls` print it.
        config: None: the user's configuration, read now.
    Raises: UnknownRunError if there is no such run under the data root.
    """

    def __init__(self, run_id: str, *, config: Config | None = None) -> None:
        self._config = config or load_config()
        self.folder = RunFolder.find(self._config.data_root, run_id)

    @property
    def id(self) -> str:
        """The run's name everywhere: folder, job name, `tinker-hpc status ID`."""
        return self.folder.run_id

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    def status(self) -> RunStatus:
        """How it is doing: its own files, then one question to Slurm."""
        own = read_own_files(self.folder)
        return combine(self.id, own, self._ask(0.0) if own.submitted else None)

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return isinstance(self.waiter().step(), Ended) or self.status().finished

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the loop and return what the function returned (None for a command or a session).

        Args:
            timeout: seconds to wait at most; None: as long as it takes. The run goes on either way.
        Raises:
            LoopFailedError: the function raised (its exception is the `__cause__` where it could be brought here), or
                the command ended with another exit code than 0. Has remote_traceback and log_paths.
            JobFailedError: the job ended before the loop did; the subclass and message say why.
            TimeoutError: not over within `timeout`.
        """
        give_up_at = None if timeout is None else clock.monotonic() + timeout
        waiter = self.waiter()
        while not isinstance(step := waiter.step(), Ended):
            if give_up_at is not None:
                step = min(step, give_up_at - clock.monotonic())
                if step <= 0:
                    known = f" ({waiter.job.state.value}: {waiter.job.reason})" if waiter.job else ""
                    raise TimeoutError(
                        f"run {self.id} is not over after {timeout} s{known}; it goes on. Ask again later."
                    )
            clock.sleep(step)
        return self._finish(step)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise, or None. Raises: TimeoutError as `result`."""
        try:
            self.result(timeout)
        except (LoopFailedError, JobFailedError) as error:
            return error
        return None

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result_async().__await__()

    async def _result_async(self) -> Any:
        waiter = self.waiter()
        while True:
            step = await asyncio.to_thread(waiter.step)
            if isinstance(step, Ended):
                return self._finish(step)
            await asyncio.sleep(step)

    def cancel(self) -> None:
        """End the run's jobs, pending or running, and all they started. Cancelling what has ended is no error."""
        from launch.further_workers import cancel_worker_runs
        from launch.lineage import jobs_of
        from launch.submit import cancel

        if not self.folder.cancel.exists():
            write_json(self.folder.cancel, {"requested_at": clock.time(), "host": socket.gethostname()})
        cancel(jobs_of(self.folder))
        cancel_worker_runs(self.folder)

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per optimizer step, in order: what the worker measured."""
        return read_metrics(self.folder)

    def events(self) -> list[dict[str, Any]]:
        """The run's history as its supervisor wrote it, oldest first."""
        return read_events(self.folder)

    def checkpoints(self) -> list[Checkpoint]:
        """States and sampler weights that the run saved, oldest first."""
        return checkpoints_of_run(self.folder)

    @property
    def log_paths(self) -> dict[str, Path]:
        """The logs there are, by name: loop, gateway, worker-0 ..., and job (what Slurm itself wrote)."""
        named = {path.stem: path for path in sorted(self.folder.logs.glob("*.log"), key=_most_telling_first)}
        for path in sorted(self.folder.slurm.glob("*_log.*")) + sorted(self.folder.slurm.glob("*.log")):
            named[f"job/{path.name}"] = path
        return named

    def logs(self, which: str = "loop", *, tail: int | None = None) -> str:
        """The text of one log; "" while it does not exist.

        Args:
            which: a name of `log_paths`.
            tail: the last so many lines only.
        Raises: ConfigError for a log that cannot exist.
        """
        paths = self.log_paths
        if which not in paths:
            if which in ("loop", "gateway") or which.startswith(("worker-", "job")):
                return ""
            raise ConfigError(f"run {self.id} has no log {which!r}; there are {', '.join(paths) or 'none yet'}.")
        text = paths[which].read_text("utf-8", errors="replace")
        return text if tail is None else "".join(text.splitlines(keepends=True)[-tail:])

    def _ask(self, max_age_s: float) -> Any:
        from launch.lineage import jobs_of
        from tinker_hpc.job_watch import JOBS

        return JOBS.status(jobs_of(self.folder), max_age_s=max_age_s)

    def waiter(self) -> Waiter:
        """What decides when this run is over, for those who want to do something between its steps."""
        from launch.lineage import jobs_of

        jobs = jobs_of(self.folder)
        local = bool(jobs) and jobs[-1].executor == "local"
        return Waiter(self.folder, ask=self._ask, patience=LOCAL_PATIENCE if local else SLURM_PATIENCE)

    def _finish(self, ended: Ended) -> Any:
        """The value, or the right error, of a run that is over."""
        from launch.failure import error_for
        from launch.job_state import JobState, JobStatus

        logs = tuple(str(path) for path in self.log_paths.values())
        if ended.own.has_result:
            outcome = load_outcome(self.folder.result.read_bytes())
            if outcome.error_type is None:
                return outcome.value
            raise LoopFailedError(
                f"the loop of run {self.id} raised {outcome.error_type}: {outcome.message}\n\n"
                f"{outcome.remote_traceback.rstrip()}\n\nLog: {self.folder.logs / 'loop.log'}",
                run_id=self.id,
                error_type=outcome.error_type,
                remote_traceback=outcome.remote_traceback,
                log_paths=logs,
            ) from outcome.exception
        own, job = ended.own, ended.job
        command, outcome = own.spec.get("command"), dict(own.outcome or {})
        state = combine(self.id, own, job).state
        if state.ok and (command is not None or own.spec.get("kind") == "session"):
            return None
        if command is not None and outcome.get("reason") == "loop" and state is JobState.FAILED:
            code = outcome.get("exit_code")
            raise LoopFailedError(
                f"the command of run {self.id} ended with exit code {code}: {' '.join(command)}\n\n"
                f"{self.logs('loop', tail=_TAIL_LINES).rstrip()}\n\nLog: {self.folder.logs / 'loop.log'}",
                run_id=self.id,
                exit_code=code,
                remote_traceback=outcome.get("traceback") or "",
                log_paths=logs,
            )
        if job is None and not outcome:
            raise JobFailedError(
                f"run {self.id} has no job: the client that submitted it ended before Slurm took it. Submit it again.",
                reason="never submitted",
                log_paths=logs,
            )
        if job is None or not job.state.finished:  # the supervisor has said why before its job was over
            job = JobStatus(job.job_id if job else own.job_ids[-1] if own.job_ids else "?", state)
        raise error_for(job, JobSpec.from_json(own.spec), logs, outcome=outcome)


def _most_telling_first(log: Path) -> tuple[int, str]:
    order = ("loop", "worker", "keeper", "gateway")
    return next((i for i, start in enumerate(order) if log.stem.startswith(start)), len(order)), log.stem
