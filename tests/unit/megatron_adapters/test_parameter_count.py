"""A model whose adapters would not have the published number of parameters does not start."""

from __future__ import annotations

from pathlib import Path

import published_configs
import pytest

from megatron_adapters import parameter_count
from megatron_adapters.engine import Engine, Layout
from megatron_adapters.families import read_architecture
from megatron_adapters.parameter_count import check_count, check_counts
from tinker_hpc.errors import WeightsError

NAMES = ["Llama-3.1-70B", "Qwen3-8B", "Qwen3-235B-A22B", "DeepSeek-V3", "gpt-oss-120b"]


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 4, 4, 2)], ids=["one rank", "TP2 DP4 PP4 EP2"])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_make_is_what_the_formula_counts(name: str, layout: Layout, tmp_path: Path) -> None:
    arch, _ = read_architecture(published_configs.write(name, tmp_path))
    check_counts(arch, layout)


def test_start_refuses_a_mismatch_before_it_loads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published_configs.write("Qwen3-8B", tmp_path)  # config.json alone: loading would say so
    published = parameter_count.projections

    def one_too_few(*args: object, **kwargs: object) -> object:
        return published(*args, **kwargs)[1:]  # type: ignore[arg-type]

    monkeypatch.setattr(parameter_count, "projections", one_too_few)
    without_a_query = 958_464 - 4096 - 4096
    words = rf"rank 1 \(train_attn\) has {without_a_query} trainable parameters, the formula says 958464\."
    with pytest.raises(WeightsError, match=words):
        Engine.start(folder, Layout())


def test_an_adapter_is_counted_as_it_was_built(tmp_path: Path) -> None:
    arch, _ = read_architecture(published_configs.write("Qwen3-8B", tmp_path))
    attention = {"train_attn": True, "train_mlp": False, "train_unembed": False}
    check_count(arch, Layout(), 32, attention, per_expert=False, built=(0, 32 * 958_464))
    with pytest.raises(WeightsError, match=f"has {32 * 958_464 - 1} trainable"):
        check_count(arch, Layout(), 32, attention, per_expert=False, built=(0, 32 * 958_464 - 1))
