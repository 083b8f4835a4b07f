"""`make demo` shows what it promises: learning, a curve, an adapter that peft agrees with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_demo_learns_and_exports(tmp_path: Path) -> None:
    environment = os.environ | {
        "TINKER_HPC_DATA_ROOT": str(tmp_path / "data"),
        "TINKER_HPC_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "no-configuration"),
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "tinker_hpc.demo", "--steps", "25", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)

    before, after = re.search(r"nats per answer token.*?(\d+\.\d+)\D+?(\d+\.\d+)", done.stdout).groups()
    assert float(after) < 0.5 * float(before)
    assert re.search(r"one answer to.*Aye, captain", done.stdout), "the answer after does not speak in the new form"
    (results,) = (tmp_path / "out").iterdir()
    assert (results / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (results / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "agree: largest logprob difference" in done.stdout
