"""The oldest supported SDK and the installed one get the same numbers from the same gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import serving
import tinker

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("any_sdk_program.py")


def run_program(service: serving.Service, packages: Path | None) -> dict:
    env = {**os.environ, "TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
    if packages is not None:
        env["PYTHONPATH"] = str(packages)
    argv = [sys.executable, "-W", "ignore", str(PROGRAM), service.base_model]
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
