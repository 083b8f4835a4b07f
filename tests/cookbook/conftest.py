"""One session with two base models serves every recipe; each recipe is a process of the cookbook's own environment.

tinker-cookbook 0.5.8 wants transformers <= 5.5.4 and huggingface_hub 1, tinker_hpc's worker the newest of both. A loop
and a worker need not share an environment, and here they do not: `make cookbook-env` makes .venv-cookbook.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import local_datasets
import pytest
import stretched_model
from recipe_runner import ALSO_TEACHER, PYTHON, STUDENT, TEACHER, TINY, Place
from sdk_programs import python_path

from tinker_hpc.sessions import Session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A recipe starts torch, transformers and datasets: seconds before it does anything."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The user's side of it: three lines of configuration, datasets as folders where the loop runs."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON.parent.parent.name} is not there: make cookbook-env")
    root = tmp_path_factory.mktemp("cookbook")
    stretched_model.write(TINY, root / "teacher", max_context=8192)
    folders = {STUDENT: TINY, TEACHER: root / "teacher", ALSO_TEACHER: root / "teacher"}
    lines = [f'"{name}" = "{folder}"' for name, folder in folders.items()]
    (root / "config.toml").write_text("\n".join(['cluster = "local"', "[base_models]", *lines, ""]))
    local_datasets.write_all(root / "work")
    environment = {
        **os.environ,
        "TINKER_HPC_CONFIG": str(root / "config.toml"),
        "TINKER_HPC_DATA_ROOT": str(root / "data"),
        "TINKER_HPC_STATE_DIR": str(root / "state"),
        "HF_DATASETS_CACHE": str(root / "datasets-cache"),
        "HF_HUB_OFFLINE": "1",
        "TINKER_TELEMETRY": "0",
        "WANDB_MODE": "disabled",
        "TINKER_COOKBOOK_RUNS_DIR": str(root / "logs"),
        "PYTHONPATH": python_path(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return Place(root, root / "data", environment)


@pytest.fixture(scope="session")
def served(place: Place) -> Iterator[Place]:
    """The same with TINKER_BASE_URL set: a gateway and a worker for each of the two base models."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TINKER_HPC_CONFIG", "TINKER_HPC_DATA_ROOT", "TINKER_HPC_STATE_DIR"):
            patch.setenv(name, place.environment[name])
        with Session(name="cookbook") as session:
            session.serve(STUDENT)
            session.serve(TEACHER)
            assert session.hub_cache is not None
            address = {
                "TINKER_BASE_URL": session.base_url,
                "TINKER_API_KEY": session.api_key,
                "HF_HUB_CACHE": str(session.hub_cache),
                "no_proxy": "127.0.0.1,localhost",
            }
            yield Place(place.root, place.data_root, {**place.environment, **address})
