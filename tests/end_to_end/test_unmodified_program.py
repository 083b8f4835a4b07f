"""A Tinker program that knows nothing of tinker_hpc runs under `tinker-hpc run`, and its failure is the command's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY = HERE.parent / "models" / "tiny-qwen3"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user's own configuration: the hub name the program uses is a folder here, as on a cluster without internet."""
    configuration = tmp_path / "config.toml"
    configuration.write_text(f'[base_models]\n"Qwen/Qwen3-8B" = "{TINY}"\n')
    return os.environ | {
        "TINKER_HPC_CONFIG": str(configuration),
        "TINKER_HPC_DATA_ROOT": str(tmp_path / "data"),
        "TINKER_HPC_STATE_DIR": str(tmp_path / "state"),
    }


def command_line(*words: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "tinker-hpc"
    return subprocess.run(
        [program, *words], env=environment, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )


def run_here(*command: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    words = ("run", "--base-model", "Qwen/Qwen3-8B", "--cluster", "local", "--", *command)
    return command_line(*words, environment=environment, cwd=cwd)


def test_seed_program_runs_unmodified(environment: dict[str, str], tmp_path: Path) -> None:
    assert "tinker_hpc" not in (HERE / "seed_program.py").read_text().split('"""')[2]
    done = run_here(sys.executable, str(HERE / "seed_program.py"), environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    (run,) = json.loads(command_line("ls", "--json", environment=environment, cwd=tmp_path).stdout)
    assert run["state"] == "COMPLETED"
    output = command_line("logs", run["id"], environment=environment, cwd=tmp_path).stdout
    saved = re.search(r"saved (tinker://\S+/weights/seed)", output)
    assert saved, output
    listed = command_line("checkpoints", run["id"], "--json", environment=environment, cwd=tmp_path).stdout
    assert saved[1] in listed
    losses = [float(word) for word in re.search(r"losses (.*)", output)[1].split()]
    assert losses == sorted(losses, reverse=True)


def test_a_failing_program_fails_the_command(environment: dict[str, str], tmp_path: Path) -> None:
    done = run_here(sys.executable, "-c", "raise SystemExit(7)", environment=environment, cwd=tmp_path)
    assert done.returncode != 0
    assert "7" in done.stdout + done.stderr
