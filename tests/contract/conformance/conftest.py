"""Conformance: what any server of Tinker's API must do, written from the semantics. Point it at any base URL:

    TINKER_BASE_URL=http://127.0.0.1:8765 TINKER_API_KEY=tml-... CONFORMANCE_BASE_MODEL=Qwen/Qwen3-8B \
        pytest tests/contract/conformance

Without CONFORMANCE_BASE_MODEL it starts a gateway and a worker of this checkout on the tiny model. Runs with every SDK
from 0.25 on; tests of what an older SDK has no call for are left out with it (`since`), and promises that are ours
beyond Tinker's are left out for other servers (`ours`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import serving
import tinker

ELSEWHERE = "CONFORMANCE_BASE_MODEL"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if "contract/conformance" in item.path.as_posix()]
    out = [item for item in here if _too_old(item) or (ELSEWHERE in os.environ and item.get_closest_marker("ours"))]
    if out:
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=out)


def _too_old(item: pytest.Item) -> bool:
    since = item.get_closest_marker("since")
    return since is not None and _version(tinker.__version__) < _version(since.args[0])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> serving.Service:
    """The server under test."""
    if ELSEWHERE in os.environ:
        return serving.Service(os.environ["TINKER_BASE_URL"], os.environ["TINKER_API_KEY"], os.environ[ELSEWHERE])
    return request.getfixturevalue("service")


@pytest.fixture(scope="session")
def service_client(server: serving.Service) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key)
    yield client
    if hasattr(client, "close"):  # since 0.28
        client.close("success").result(timeout=120)


@pytest.fixture
def training_client(server: serving.Service, service_client: tinker.ServiceClient) -> tinker.TrainingClient:
    """A fresh adapter of rank 4, always of the same seed."""
    return serving.done(service_client.create_lora_training_client(base_model=server.base_model, rank=4, seed=1))
