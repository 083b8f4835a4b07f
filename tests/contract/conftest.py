"""What the contract tests run against: a gateway and a one-rank worker on this machine, started once.

Tests of the semantics, which any other server can be asked to pass, are in conformance/.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving
import tinker


@pytest.fixture(scope="session", autouse=True)
def sdk_environment() -> Iterator[None]:
    """No telemetry, and loopback never through a site's proxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def service() -> Iterator[serving.Service]:
    """A gateway with a real worker behind it."""
    # Not below pytest's own folders: nobody else may pass those, and publishing refuses where nobody could come.
    with tempfile.TemporaryDirectory(prefix="tinker_hpc-contract-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        run, worker = serving.new_run(folder / "root")
        with serving.processes_in(folder) as processes:
            started = serving.start_gateway(processes, run)
            serving.start_worker(processes, worker)
            yield started


@pytest.fixture(scope="session")
def oldest_sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the oldest supported SDK, for PYTHONPATH of a subprocess."""
    target = tmp_path_factory.mktemp("oldest_sdk")
    wanted = f"tinker=={serving.OLDEST_SDK}"
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), wanted]
    installed = subprocess.run(argv, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"needs the package index: {' '.join(argv[1:])}: {installed.stderr.strip()[-300:]}")
    return target


@pytest.fixture(scope="session")
def service_client(service: serving.Service) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
    yield client
    client.close("success").result(timeout=120)


@pytest.fixture
def training_client(service: serving.Service, service_client: tinker.ServiceClient) -> tinker.TrainingClient:
    """A fresh adapter of rank 4, always of the same seed."""
    future = service_client.create_lora_training_client(base_model=service.base_model, rank=4, seed=1)
    return future.result(timeout=60)


@pytest.fixture(scope="session")
def calm_run(tmp_path_factory: pytest.TempPathFactory) -> serving.CalmRun:
    import test_replay

    folder = tmp_path_factory.mktemp("calm")
    with serving.processes_in(folder) as processes:
        run, worker = serving.new_run(folder / "root")
        service = serving.start_gateway(processes, run)
        serving.start_worker(processes, worker)
        printed = test_replay.start(service, steps=serving.CalmRun.steps, sample=True)
        num_requests = test_replay.num_requests(service)
        state = test_replay.state_of(service, printed)
        others = test_replay.start(service, steps=serving.CalmRun.steps, sample=True, other_from=2)
        other_state = test_replay.state_of(service, others)
    return serving.CalmRun(test_replay.numbers(printed), state, num_requests, test_replay.numbers(others), other_state)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[serving.Processes]:
    with serving.processes_in(tmp_path) as started:
        yield started


@pytest.fixture
def alone(tmp_path: Path, processes: serving.Processes) -> serving.Service:
    """A gateway without a worker."""
    run, _ = serving.new_run(tmp_path / "root")
    return serving.start_gateway(processes, run)
