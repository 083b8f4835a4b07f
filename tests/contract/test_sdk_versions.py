"""The oldest supported SDK and the installed one: the same numbers, and the same conformance suite green."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import serving
import tinker

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("any_sdk_program.py")
CONFORMANCE = Path(__file__).with_name("conformance")


def run_program(service: serving.Service, packages: Path | None) -> dict:
    argv = [sys.executable, "-W", "ignore", str(PROGRAM), service.base_model]
    env = serving.program_environment(service, packages)
    ran = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_oldest_and_the_newest_sdk(service, oldest_sdk):
    old, new = run_program(service, oldest_sdk), run_program(service, None)
    assert (old.pop("version"), new.pop("version")) == (serving.OLDEST_SDK, tinker.__version__)
    for result in (old, new):
        assert result["losses"][-1] < result["losses"][0]
        assert result["again"] == result["now"], "a state resumes where it was saved"
        assert "expected 0 <= beta1 < 1" in result.pop("refused")
        assert result["scored"][0] is None
    assert old == new


def test_the_conformance_suite_with_the_oldest_sdk(service, oldest_sdk):
    """As it is pointed at any server; with the installed SDK it runs beside this test."""
    env = {**serving.program_environment(service, oldest_sdk), "CONFORMANCE_BASE_MODEL": service.base_model}
    argv = [sys.executable, "-m", "pytest", str(CONFORMANCE), "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    ran = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-1000:]
    summary = re.search(r"(\d+) passed, (\d+) deselected", ran.stdout)
    assert summary is not None and int(summary[1]) >= 25 and int(summary[2]) <= 5, ran.stdout[-300:]
