"""How a recipe of the cookbook is run here: which Python, which models, where; and a line of the tier."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tinker_hpc.checkpoints import find_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "tests" / "models" / "tiny-qwen3"
PYTHON = REPOSITORY / ".venv-cookbook" / "bin" / "python"

STUDENT, TEACHER = "Qwen/Qwen3-8B", "Qwen/Qwen3.5-9B"
"""Names that the cookbook knows renderers for; the configuration says which folders they are here."""
ALSO_TEACHER = "Qwen/Qwen3.6-35B-A3B"
"""A name that one recipe has in its code. Two names of one folder are one worker."""
RECIPES = "tinker_cookbook.recipes"


@dataclass(frozen=True)
class Place:
    """Where recipes run: a configuration, a working folder with the datasets, and what the environment needs."""

    root: Path
    data_root: Path
    environment: dict[str, str]

    @property
    def working_folder(self) -> Path:
        return self.root / "work"

    def log_path(self, name: str) -> Path:
        """Where a recipe writes its metrics and checkpoints."""
        return self.root / "logs" / name

    def metrics(self, name: str) -> list[dict[str, float]]:
        """The recipe's own numbers, a dict a step."""
        return [json.loads(line) for line in (self.log_path(name) / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, path: str) -> Path:
        """The folder of a tinker:// path."""
        return find_checkpoint(self.data_root, path).folder

    def python(self, *words: str, timeout_s: float = 280) -> str:
        """Run the cookbook's Python in the working folder and return all it printed; fails if it fails."""
        done = subprocess.run(
            [str(PYTHON), *words],
            cwd=self.working_folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"exit code {done.returncode}: {' '.join(words)}\n{done.stdout[-6000:]}"
        return done.stdout


@dataclass(frozen=True)
class Line:
    """One recipe of the tier."""

    name: str
    module: str
    arguments: str
    metric: str
    num_steps: int = 1
    or_one_more: bool = False
    """Off policy, groups too old by then are dropped: whether enough are left for the last step is decided by time."""
    model: str = STUDENT

    def __str__(self) -> str:
        return self.name


NO_SUCH_OPTION = ("sl_loop", "rl_loop", "sl_basic", "rl_basic")
"""Recipes that ask nothing about an existing log folder."""


def start(served: Place, line: Line, *further: str) -> str:
    """Run a recipe to its end and return what it printed."""
    log_path = served.log_path(line.name.replace(" ", "-"))
    words = [f"model_name={line.model}", f"log_path={log_path}", *line.arguments.split(), *further]
    if line.module not in NO_SUCH_OPTION:
        words.append("behavior_if_log_dir_exists=resume")
    return served.python("-m", f"{RECIPES}.{line.module}", *words)
