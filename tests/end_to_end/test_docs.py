"""The documentation is true: its programs run, its commands, files and make targets exist.

Convention for the pages below, by a fence's first word:

    ```python  ```bash    executed, in the repository's root, with a data root of its own; must exit with 0
    ```toml               must be a valid configuration file
    anything else         to be read only (commands for a cluster that is not here, output)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from tinker_hpc.cli.main import COMMANDS
from tinker_hpc.config import build_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/cluster.md",
    "docs/cookbook.md",
    "docs/families.md",
    "docs/learning.md",
)
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}:{self.language}"


def blocks(*languages: str) -> list[Block]:
    """Every fenced block of the pages in one of these languages, with the line its fence is on."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in FENCE.finditer(text):
            if match[1] in languages:
                found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def prose() -> str:
    return "\n".join((ROOT / page).read_text() for page in PAGES)


def test_the_readme_has_a_program_to_run() -> None:
    assert any(block.page == "README.md" for block in blocks("python"))


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python", "bash"), ids=lambda block: block.name)
def test_block_runs(block: Block, tmp_path: Path) -> None:
    script = tmp_path / f"block.{'py' if block.language == 'python' else 'sh'}"
    script.write_text(block.text)
    environment = os.environ | {
        "TINKER_HPC_DATA_ROOT": str(tmp_path / "data"),
        "TINKER_HPC_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "no-configuration"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, script] if block.language == "python" else ["bash", "-euo", "pipefail", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{block.name} failed:\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: block.name)
def test_configuration_block_is_valid(block: Block) -> None:
    build_config(tomllib.loads(block.text), environ={"HOME": "/home/alice"}, path=ROOT / block.page)


def test_every_command_named_exists() -> None:
    named = set(re.findall(r"(?:`|^|\$ )tinker-hpc ([a-z]+)", prose(), re.MULTILINE))
    named |= {
        word
        for line in re.findall(r"^\| `tinker-hpc [^|]*\|", prose(), re.MULTILINE)
        for word in re.findall(r"`(?:tinker-hpc )?([a-z]+)\b", line)
    }
    assert named, "the pages name no command: has the notation changed?"
    assert named <= set(COMMANDS), "named in the documentation but not in the CLI"


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", prose(), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_file_named_exists() -> None:
    folders = "tinker_hpc|launch|megatron_adapters|slurm_templates|tests"
    named = set(re.findall(rf"`((?:{folders})/[\w/.-]*)`", prose()))
    for page in PAGES:  # a link starts where its page is
        links = re.findall(r"\]\(([\w/.-]+)\)", (ROOT / page).read_text())
        named |= {str(Path(page).parent / link) for link in links}
    assert named
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
