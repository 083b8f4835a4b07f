"""Per session: the reference models once, and one process group per layout that serves every test of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity_reference
import pytest
from gloo_launcher import run_ranks
from parity_reference import CONFIGS, Reference

from megatron_adapters.interface import Layout

LAYOUTS = {"tp1": Layout(1, 1), "tp2": Layout(2, 1), "tp2dp2": Layout(2, 2)}
SAVES_FOR = {"tp1": "tp2", "tp2dp2": "tp1"}
"""layout -> the layout whose saved state it resumes"""


def pytest_configure(config: pytest.Config) -> None:
    # megatron-core and peft warn about optional packages and tied embeddings; neither is ours to fix.
    for line in ("ignore:::megatron", "ignore:::peft", "ignore:::transformers", "ignore:::torch"):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """transformers + peft on every family. Computed here, in the parent, by code that imports nothing of ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("references")
    return {family: parity_reference.build(family, folder / family) for family in CONFIGS}


@pytest.fixture(scope="session")
def outcome_of(
    references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """outcome_of("tp2") runs all scenarios under that layout, once per session."""
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, BaseException] = {}

    def outcome(name: str) -> dict[str, Any]:
        if name in failed:  # once is enough: every test of the layout would wait for the same failure
            raise failed[name]
        if name not in done:
            try:
                done[name] = run(name)
            except BaseException as error:
                failed[name] = error
                raise
        return done[name]

    def run(name: str) -> dict[str, Any]:
        other = SAVES_FOR.get(name)
        saved: Path | None = outcome(other)["properties"]["save_load_step"]["folder"] if other else None
        folder, layout = tmp_path_factory.mktemp(name), LAYOUTS[name]
        return run_ranks("parity_scenarios:run_all", layout.world_size, folder, references, layout, folder, saved)

    return outcome


@pytest.fixture(scope="session", params=list(LAYOUTS))
def layout_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def properties(outcome_of: Callable[[str], dict[str, Any]], layout_name: str) -> dict[str, Any]:
    return outcome_of(layout_name)["properties"]
