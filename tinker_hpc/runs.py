"""Run: a future over the jobs of a run, found again by its id from any process.

The client may exit after submit(): the loop runs in the job. Everything a Run answers it reads from the run folder
and, where that is silent, from Slurm; it holds no state that another process would lack.
"""

from __future__ import annotations

import asyncio
import time as clock
from collections.abc import Generator
from pathlib import Path
from typing import Any

from launch.job_spec import JobSpec
from tinker_hpc.checkpoints import Checkpoint, checkpoints_of_run
from tinker_hpc.config import Config, load_config
from tinker_hpc.errors import ConfigError, JobFailedError, LoopFailedError
from tinker_hpc.payload import load_outcome
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.run_state import RunStatus, combine, read_events, read_metrics, read_own_files
from tinker_hpc.waiting import LOCAL_PATIENCE, SLURM_PATIENCE, Ended, Waiter

_TAIL_LINES = 20


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
        from launch.cancel import cancel_run
        from launch.further_workers import cancel_worker_runs

        cancel_run(self.folder)
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
        path = self.log_path(which)
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        lines = text.splitlines(keepends=True)
        return text if tail is None else "".join(lines[max(0, len(lines) - tail) :])

    def log_path(self, which: str) -> Path:
        """Where one log is, or will be. Raises: ConfigError for a log that cannot exist."""
        paths = self.log_paths
        if which in paths:
            return paths[which]
        if which.startswith("job/"):
            return self.folder.slurm / which.removeprefix("job/")
        if which in ("loop", "gateway") or which.startswith("worker-"):
            return self.folder.logs / f"{which}.log"
        raise ConfigError(f"run {self.id} has no log {which!r}; there are {', '.join(paths) or 'none yet'}.")

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
