"""Shared by every tier: a skip in CI is a failure, and third-party warnings that are not ours stay quiet."""

from __future__ import annotations

import atexit
import os

import hypothesis
import pytest

from launch.loop_start.sitecustomize import end_the_sdks_requests

CI = os.environ.get("CI") == "true"

# Or pytest, with all of its tests passed, may end by SIGABRT, as any program of the SDK may.
atexit.register(end_the_sdks_requests)

# How long an example takes is not what a property is about: a busy machine is no failure.
hypothesis.settings.register_profile("patient", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("patient")

# Importing megatron-core warns about what it did not find (Apex, TransformerEngine; we use neither) and about its own
# and torch's old names. Messages, since pytest matches modules only by their full name.
QUIET_IMPORTS = (
    "ignore:.*Apex (is|are) not installed:UserWarning",
    "ignore:The following imports from `dynamic_context.py`:DeprecationWarning",
    "ignore:The 'megatron.core.transformer.custom_layers:DeprecationWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in QUIET_IMPORTS:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A tier without a single test is a mistake, not a success (pytest's own exit code 5 says so)."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI a skipped test is a failed one, but for the GPU tier: CI has no GPU and says so."""
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where every tier must run: {report.longrepr}"
    return report
