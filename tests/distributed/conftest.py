"""Per session: the reference models once, and one start of 1, 2 and 4 ranks each for all jobs of the selected tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import parity_reference
import pytest
from jobs import Job, Outcomes
from parity_reference import Reference


def pytest_configure(config: pytest.Config) -> None:
    # megatron-core and peft warn about optional packages and tied embeddings; neither is ours to fix.
    for line in ("ignore:::megatron", "ignore:::peft", "ignore:::transformers", "ignore:::torch"):
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Whichever test comes first waits for all jobs of as many ranks.
    for item in items:
        if any(True for _ in _jobs_of(item)):
            item.add_marker(pytest.mark.timeout(1200))


class References(dict[str, Reference]):
    """transformers + peft on a family, when first asked for. Computed here, in the parent, by code that imports nothing
    of ours.
    """

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._folder = tmp_path_factory.mktemp("references")

    def __missing__(self, family: str) -> Reference:
        self[family] = parity_reference.build(family, self._folder / family)
        return self[family]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return References(tmp_path_factory)


@pytest.fixture(scope="session")
def outcome_of(
    request: pytest.FixtureRequest, references: References, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Job], Any]:
    """The outcome of a job. A test names its jobs in its parameters, so that all selected are known at the start."""
    planned = dict.fromkeys(job for item in request.session.items for job in _jobs_of(item))
    return Outcomes(planned, references.__getitem__, tmp_path_factory.mktemp("ranks"))


def _jobs_of(item: pytest.Item) -> Iterator[Job]:
    parameters = (
        item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    )
    for value in parameters:
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Job):
                yield one
