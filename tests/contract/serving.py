"""Real processes for the contract tests: a gateway, and a worker or something that stands in its place."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sdk_programs import python_path

from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder, WorkerFolder

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "models" / "tiny-qwen3"
START_S = 60.0
WORKER_START_S = 180.0
OLDEST_SDK = "0.25.0"


@dataclass
class Reply:
    """What a raw HTTP request got."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Service:
    """A gateway somewhere: all a test of the protocol needs to know."""

    base_url: str
    api_key: str
    base_model: str
    run: RunFolder | None = None

    def http(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Reply:
        """One request without the SDK and its retries. `payload`: bytes as they are, anything else as JSON."""
        where = urlsplit(self.base_url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=timeout_s)
        body = payload if isinstance(payload, bytes) else json.dumps({} if payload is None else payload).encode()
        try:
            connection.request(method, path, body=body, headers={"X-API-Key": self.api_key, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, response.read())
        finally:
            connection.close()

    def post(self, path: str, payload: Any = None, **more: Any) -> Reply:
        return self.http("POST", f"/api/v1/{path}", payload, **more)

    def get(self, path: str, **more: Any) -> Reply:
        return self.http("GET", f"/api/v1/{path}", **more)


def program_environment(service: Service, packages: Path | None = None) -> dict[str, str]:
    """Of a program with the stock SDK, the installed one or that in the folder `packages`."""
    path = python_path() if packages is None else python_path(packages)
    address = {"TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
    return {**os.environ, **address, "PYTHONPATH": path}


@dataclass
class Processes:
    """Started processes, ended by their own pids. `within`: a command that runs them (on a node of nodes.py)."""

    log_folder: Path
    within: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self.log_folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.within, sys.executable, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.env, **(env or {})},
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.log_folder / f"{name}.log").read_text(errors="replace")

    def stop(self, name: str, *, kill: bool = False) -> None:
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)

    def stop_all(self) -> None:
        for name in reversed(list(self.running)):
            self.stop(name)


@dataclass
class CalmRun:
    """What a loop of test_replay.py that nothing happened to was told, and the state it saved."""

    numbers: list[Any]
    state: dict[str, bytes]
    num_requests: int
    other_numbers: list[Any]
    """The same loop with other data from step 2 on."""
    other_state: dict[str, bytes]
    steps: int = 5


def done(value: Any, timeout_s: float = 120.0) -> Any:
    """A result, or a client. Old SDKs return clients where new ones return futures of them."""
    return value.result(timeout=timeout_s) if hasattr(value, "result") else value


def new_run(root: Path, base_model: str | Path = TINY) -> tuple[RunFolder, WorkerFolder]:
    """A run folder with one declared worker."""
    root.mkdir(mode=0o700, exist_ok=True)
    run = RunFolder.new(root, "contract")
    return run, run.worker(0).create(base_model=str(base_model), base_model_folder=str(base_model))


def start_gateway(processes: Processes, run: RunFolder, env: Mapping[str, str] | None = None) -> Service:
    """Start (or start again) the gateway and wait until it answers."""
    process = processes.start("gateway", "-m", "tinker_hpc.gateway", "--run-dir", str(run.path), env=env)
    worker = read_json(run.worker(0).declaration) or {}
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the gateway ended: {processes.log('gateway')}"
        about = read_json(run.gateway)
        if about is not None and about["pid"] == process.pid:
            service = Service(about["base_url"], about["api_key"], worker.get("base_model", ""), run)
            with contextlib.suppress(OSError):
                if service.get("healthz").status == 200:
                    return service
        time.sleep(0.02)
    raise AssertionError(f"no gateway after {START_S} s: {processes.log('gateway')}")


def start_responder(processes: Processes, worker: WorkerFolder) -> None:
    """Something that answers every request at once, without a model."""
    processes.start("responder", str(HERE / "log_responder.py"), str(worker.path))
    wait_for(lambda: (read_json(worker.status) or {}).get("phase") == "ready", START_S, "the responder")


def start_worker(processes: Processes, worker: WorkerFolder, num_ranks: int = 1, max_restarts: int = 0) -> None:
    """A real worker: ranks of torch's elastic agent. Returns when it has said its first words."""
    start_ranks(processes, worker, num_ranks, max_restarts)

    def ready() -> bool:
        assert processes.running["worker"].poll() is None, f"the worker ended: {processes.log('worker')[-4000:]}"
        return any(worker.results.iterdir())

    wait_for(ready, WORKER_START_S, "the worker")
    write_json(worker.status, {"phase": "ready", "reason": "", "error": None, "since": time.time()})


def start_ranks(processes: Processes, worker: WorkerFolder, num_ranks: int, max_restarts: int) -> None:
    argv = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}")
    module = (f"--max-restarts={max_restarts}", "--module", "tinker_hpc.worker", "--worker-dir", str(worker.path))
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as launch/children.py
    processes.start("worker", *argv, *module, env=env)


def ranks_of(processes: Processes) -> list[int]:
    """Pids of the worker's ranks; fewer while its agent starts them."""
    agent = processes.running["worker"].pid
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def wait_for(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come within {timeout_s} s")
        time.sleep(0.02)


@contextlib.contextmanager
def processes_in(
    folder: Path, within: tuple[str, ...] = (), env: Mapping[str, str] | None = None
) -> Iterator[Processes]:
    started = Processes(folder, within, env or {})
    try:
        yield started
    finally:
        started.stop_all()


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A filesystem of its own at `at`, remountable; needs root (CI is)."""
    at.mkdir(mode=0o700)
    options = f"size={size},mode=700"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", at], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk ({made.stderr.decode().strip()}); run as root: pytest tests/contract")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", at], check=True) and None
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def damage(folder: Path, how: str) -> Path:
    """Cut or change the newest segment below `folder`."""
    newest = max(folder.rglob("seg-*"), key=lambda path: path.name)
    data = bytearray(newest.read_bytes())
    if how == "cut":
        newest.write_bytes(data[: len(data) // 2])
    else:
        data[100] ^= 0xFF
        newest.write_bytes(data)
    return newest
