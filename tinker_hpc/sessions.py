"""A session: a gateway here and workers as jobs, without a loop in the job. For notebooks and `tinker-hpc serve`.

The client's part only: start the keeper (session_keeper.py), which owns gateway and jobs, and submit a worker when a
base model is named. The keeper holds one end of a pipe; when this end goes, by close() or by death, it ends it all.
Should it end before that, it is said here at once: the SDK would ask a gateway that is gone for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from launch import hub_view
from launch.gateway_client import GatewayAddress, answers, read_address
from launch.log_tail import last_lines, read_tail
from launch.submit import submit as submit_job
from tinker_hpc.base_models import resolve, same_model
from tinker_hpc.checkpoints import find_checkpoint
from tinker_hpc.config import Config, load_config
from tinker_hpc.errors import ConfigError, DataRootError, SessionError, SlurmUnavailableError, SubmissionError
from tinker_hpc.resources import Resources, build_job_spec, check_run_name
from tinker_hpc.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
_GATEWAY_PATIENCE_S = 60.0
_CLOSE_PATIENCE_S = 60.0
"""The keeper gives workers 20 s, cancels, and ends the gateway within 5 s; Slurm may take its time to answer."""


@dataclass(frozen=True)
class _Served:
    """A base model with a worker of this session."""

    asked: str
    folder: str
    run_id: str


class Session:
    """A running session. Close it, or use it as a context manager; if this process dies it closes itself.

    Args:
        cluster: profile of the workers' jobs. None: the configuration's default.
        resources: sizes of each worker's job.
        name: start of the session's id.
    Raises: SessionError if the gateway does not start; ConfigError, DataRootError.
    """

    def __init__(
        self,
        *,
        cluster: str | None = None,
        resources: Resources | None = None,
        name: str | None = None,
        config: Config | None = None,
    ) -> None:
        self._config = config or load_config()
        self._profile = self._config.profile(cluster)
        self._resources = resources or Resources()
        self._name = check_run_name(name, otherwise="session")
        self._lock = threading.RLock()
        self._served: list[_Served] = []
        self._unanswered: dict[Path, RunFolder] = {}
        """By base model's folder: submitted, but whether there is a job is not known. The next `serve` of it tells."""
        self._closed = False
        self.folder = RunFolder.new(self._config.data_root, self._name)
        mapping = self._config.base_models
        self.hub_cache = (
            hub_view.build(self.folder.path / "hub", mapping, hub_view.cache_folder(os.environ)) if mapping else None
        )
        """For HF_HUB_CACHE: where tokenizers are found by the hub names of `[base_models]`. None: there are none."""
        self._keeper = self._start_keeper()
        try:
            self._address = self._wait_for_gateway()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._tell_early_end, name=f"keeper-{self.id}", daemon=True).start()

    @property
    def id(self) -> str:
        """The session's name: its folder, and `tinker-hpc status ID`."""
        return self.folder.run_id

    @property
    def base_url(self) -> str:
        """Of the gateway, http on 127.0.0.1."""
        return self._address.base_url

    @property
    def api_key(self) -> str:
        """A random key of this session; whoever has it can use the session."""
        return self._address.api_key

    @property
    def closed(self) -> bool:
        """Whether it is over: `close` was called, or its keeper has ended it."""
        return self._closed or self._keeper.poll() is not None

    def serve(self, base_model: str) -> str:
        """Have a worker for `base_model`: submit a job for it unless there is one. Returns its run id, at once.

        Raises: UnknownBaseModelError, ConfigError, DataRootError, SubmissionError, SlurmUnavailableError; SessionError
        if the session is over.
        """
        with self._lock:
            if self.closed:
                why = "is closed" if self._closed else f"is over: {self._keepers_last_words()}"
                raise SessionError(f"session {self.id} {why.rstrip('.')}. Open another one.")
            for served in self._served:
                if same_model(base_model, served.asked, served.folder, self._config.base_models):
                    return served.run_id
            model = resolve(base_model, self._config.base_models)
            index = len(self._served) + len(self._unanswered)
            earlier = self._unanswered.get(model.folder)
            folder = earlier or (self.folder.add_worker_run(index) if index else self.folder)
            try:
                spec = build_job_spec(
                    self._resources,
                    profile=self._profile,
                    base_model=model,
                    asked_base_model=base_model,
                    run_id=folder.run_id,
                    kind="session",
                    name=self._name,
                    per_expert=self._config.expert_lora == "per_expert",
                )
                submit_job(spec, folder)
            except (ConfigError, SubmissionError, SlurmUnavailableError, DataRootError) as error:
                if getattr(error, "job_may_exist", isinstance(error, DataRootError)):
                    self._unanswered[model.folder] = folder
                elif earlier is None:  # no job, so nothing to list
                    folder.spec.unlink(missing_ok=True)
                    folder.worker(0).declaration.unlink(missing_ok=True)
                    if index:
                        self.folder.worker(index).path.unlink()
                        shutil.rmtree(folder.path, ignore_errors=True)
                raise
            self._unanswered.pop(model.folder, None)
            self._served.append(_Served(base_model, str(model.folder), folder.run_id))
            return folder.run_id

    def serve_checkpoint(self, path: str) -> str | None:
        """Have a worker for the base model a `tinker://` checkpoint was trained on; None if there is no such one."""
        try:
            checkpoint = find_checkpoint(self._config.data_root, path)
        except ConfigError:
            return None  # the gateway's own answer says what is wrong with the path
        return self.serve(checkpoint.base_model)

    def close(self) -> None:
        """End the worker jobs and the gateway. Returns when they are gone, or after a minute at most."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._keeper.stdin is not None:
            with contextlib.suppress(OSError):
                self._keeper.stdin.close()
        try:
            self._keeper.wait(_CLOSE_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise SessionError(
                f"session {self.id} did not end within {_CLOSE_PATIENCE_S:.0f} s; its keeper (process "
                f"{self._keeper.pid}) goes on trying. Log: {self.folder.logs / 'keeper.log'}"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell_early_end(self) -> None:
        """Wait for the keeper; log why it ended if nobody closed the session."""
        self._keeper.wait()
        if not self._closed:
            _LOG.error("session %s is over: %s", self.id, self._keepers_last_words())

    def _keepers_last_words(self) -> str:
        log = self.folder.logs / "keeper.log"
        said = last_lines(read_tail(log), 1) or f"its keeper ended with exit code {self._keeper.returncode}"
        return f"{said} (log: {log})"

    def _start_keeper(self) -> subprocess.Popen[bytes]:
        with (self.folder.logs / "keeper.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "tinker_hpc.session_keeper", "--run-dir", str(self.folder.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the client; the keeper ends when the pipe does
            )

    def _wait_for_gateway(self) -> GatewayAddress:
        deadline = time.monotonic() + _GATEWAY_PATIENCE_S
        while time.monotonic() < deadline:
            address = read_address(self.folder)
            if address is not None and answers(address):
                return address
            if self._keeper.poll() is not None:
                break
            time.sleep(0.05)
        logs = [self.folder.logs / name for name in ("gateway.log", "keeper.log")]
        said = next((text for log in logs if log.exists() and (text := last_lines(read_tail(log), 5))), "nothing")
        raise SessionError(
            f"the gateway of session {self.id} did not start within {_GATEWAY_PATIENCE_S:.0f} s. It said: {said} "
            f"Logs: {self.folder.logs}",
            log_paths=tuple(map(str, logs)),
        )
