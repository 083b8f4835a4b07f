"""The two flat recipes learn what their headers promise. Curves: docs/learning.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from curves import record

import tinker_hpc
from tinker_hpc.recipes import rl, sft

pytestmark = pytest.mark.slow

TINY = str(Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3")


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_HPC_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("TINKER_HPC_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-configuration"))


def test_supervised_fine_tuning_reaches_its_loss() -> None:
    run = tinker_hpc.submit(sft.train, TINY, base_model=TINY, cluster="local", name="sft")
    result = run.result(timeout=280)
    print(f"held-out loss {result.loss_before:.3f} -> {result.loss_after:.4f}, right {result.right_after:.2f}")
    record("sft", "SFT: a new form of answer", "nats per answer token", result.losses)
    assert result.loss_before > 3.0
    assert result.loss_after < 0.05
    assert result.right_before == 0.0 and result.right_after > 0.5


def test_reinforcement_raises_the_reward() -> None:
    run = tinker_hpc.submit(rl.train, TINY, base_model=TINY, cluster="local", name="rl")
    result = run.result(timeout=580)
    start, end = sum(result.rewards[:3]) / 3, sum(result.rewards[-5:]) / 5
    print(f"mean reward {start:.3f} -> {end:.3f}; held out {result.right_before:.3f} -> {result.right_after:.3f}")
    record("rl", "RL: right sums, sampled at T = 1", "mean reward", result.rewards)
    assert result.right_after - result.right_before >= 0.3, "on sums it never trained on, with the same seeds"
    assert end - start >= 0.2, "the first three steps are part of the learning already"
