"""The throughput benchmark still runs, measures the same thing on both sides, and its table can be made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.distributed
def test_quick_run_writes_a_complete_record(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "bench_throughput.py"), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("throughput-*.json")
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] and record["device"]["name"] and record["config"]["new_tokens"] == 4
    assert set(record["metrics"]) == {"training", "sampling, groups", "sampling, prompts"}
    for metrics in record["metrics"].values():
        sides = metrics["tokens_per_s"]
        assert set(sides) == {"tinker_hpc", "transformers_peft", "ratio_tinker_hpc_to_transformers_peft"}
        assert all(0 < row["p10"] <= row["median"] <= row["p90"] for row in sides.values())


def test_table_shows_every_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import record
    import table

    outcome = record.Outcome("made_up", config={"size": 3}, warmup=0, repeats=3)
    outcome.add("case", "step_time_ms", {"ours": [1.0, 2.0, 3.0], "theirs": [2.0, 2.0, 1.0]})
    written = outcome.write(tmp_path)
    made = json.loads(written.read_text())
    assert made["metrics"]["case"]["step_time_ms"]["ratio_ours_to_theirs"]["median"] == 1.0
    table.main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| case | step_time_ms | ours | 2 | 1.2 to 2.8 |" in text and "size: 3" in text
    glance = f"made_up, {made['device']['kind']}, {made['date']} | case | step_time_ms | ours to theirs | 1 |"
    assert glance in text


def test_committed_table_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import table

    committed = HERE / "results" / "README.md"
    for path in committed.parent.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    table.main(tmp_path)
    assert committed.read_text() == (tmp_path / "README.md").read_text(), "run: python tests/benchmarks/table.py"
