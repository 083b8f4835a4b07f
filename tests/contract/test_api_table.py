"""Every public method of the SDK's four clients works, or is refused with one sentence; api_table.md is the proof.

api_driver.py finds the methods by introspection and calls each. The table is compared whole: after a change, run with
UPDATE_API_TABLE=1 and look at the difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import serving

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
TABLE = HERE / "api_table.md"
# Fails in the SDK itself, before anything is sent ("AsyncTinker client called from incorrect event loop").
BROKEN_IN_OLDEST = {"RestClient.get_audit_log_async"}


def drive(service: serving.Service, packages: Path | None = None) -> tuple[str, dict[str, str]]:
    """(SDK version, outcome of each method) of the SDK in `packages`, or the installed one."""
    env = serving.program_environment(service, packages)
    argv = [sys.executable, "-W", "ignore", str(HERE / "api_driver.py"), service.base_model]
    ran = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    return found["version"], found["outcomes"]


@pytest.fixture(scope="module")
def newest(service) -> tuple[str, dict[str, str]]:
    return drive(service)


@pytest.fixture(scope="module")
def oldest(service, oldest_sdk) -> tuple[str, dict[str, str]]:
    return drive(service, oldest_sdk)


def wrong(outcomes: dict[str, str]) -> dict[str, str]:
    return {method: outcome for method, outcome in outcomes.items() if outcome.startswith(("unknown", "failed"))}


def test_none_is_unknown_and_none_fails_with_the_newest_sdk(newest):
    assert len(newest[1]) >= 100
    assert wrong(newest[1]) == {}


def test_none_is_unknown_and_none_fails_with_the_oldest_sdk(newest, oldest):
    version, outcomes = oldest
    assert version == serving.OLDEST_SDK
    assert set(wrong(outcomes)) == BROKEN_IN_OLDEST
    both = set(outcomes) & set(newest[1]) - BROKEN_IN_OLDEST
    assert {method: outcomes[method] for method in both} == {method: newest[1][method] for method in both}


def test_the_table_says_so(newest, oldest):
    lines = rendered(newest, oldest)
    if os.environ.get("UPDATE_API_TABLE"):
        TABLE.write_text(lines)
    assert TABLE.read_text() == lines, "run with UPDATE_API_TABLE=1 and look at the difference"


def rendered(newest: tuple[str, dict[str, str]], oldest: tuple[str, dict[str, str]]) -> str:
    version, outcomes = newest
    lines = [
        "# What becomes of each public method of the Tinker SDK",
        "",
        "Written by `UPDATE_API_TABLE=1 pytest tests/contract/test_api_table.py`, which calls each of them with "
        f"tinker {version}, and with {oldest[0]} those it has. A method and its deprecated `_async` form share a line.",
        "",
        "| method | outcome |",
        "|---|---|",
        *_rows(outcomes),
        "",
        f"Only in older versions ({oldest[0]}):",
        "",
        "| method | outcome |",
        "|---|---|",
        *_rows({method: outcome for method, outcome in oldest[1].items() if method not in outcomes}),
    ]
    return "\n".join(lines) + "\n"


def _rows(outcomes: dict[str, str]) -> list[str]:
    rows = []
    for method, outcome in outcomes.items():
        other = outcomes.get(f"{method}_async")
        if method.endswith("_async") and outcomes.get(method.removesuffix("_async")) == outcome:
            continue
        name = f"`{method}`, `_async`" if other == outcome else f"`{method}`"
        rows.append(f"| {name} | {outcome.replace('|', chr(92) + '|')} |")
    return rows
