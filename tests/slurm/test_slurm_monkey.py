"""The short form of the fault bench (tests/benchmarks/faults): some twenty blows, nothing lost or done twice."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import why_not

FAULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "faults"


@pytest.mark.timeout(900)
def test_twenty_blows(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(sys, "path", [str(FAULTS), *sys.path])
    import run_monkey

    cluster, fill = run_monkey.bring_up()
    try:
        report = run_monkey.bench(
            cluster, seeds=range(7, 11), num_strikes=7, parallel=2, fill=fill, stop_at=time.time() + 600
        )
    finally:
        run_monkey.take_down(cluster)
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))
    assert report["troubles"] == []
    assert report["num_equal"] == report["num_runs"] == 4
    assert report["num_blows"] >= 20


def test_the_plan_is_the_seeds() -> None:
    sys.path.insert(0, str(FAULTS))
    try:
        from plan import MAX_IN_VAIN, WEIGHTS, strikes
    finally:
        sys.path.remove(str(FAULTS))
    assert strikes(3, 50) == strikes(3, 50) != strikes(4, 50)
    planned = [strike for seed in range(200) for strike in strikes(seed, 10)]
    assert {(strike.what, strike.how) for strike in planned} == set(WEIGHTS), "everything is struck sooner or later"
    for seed in range(200):
        waits = "".join("." if strike.waits_for_progress else "x" for strike in strikes(seed, 10))
        assert "x" * (MAX_IN_VAIN + 1) not in waits
