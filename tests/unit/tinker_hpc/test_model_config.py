"""A config.json that is not what its readers take it for is refused by file and field, at both ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adapters.families import read_hf_config
from tinker_hpc.base_models import resolve
from tinker_hpc.errors import ConfigError, UnknownBaseModelError
from tinker_hpc.model_config import checked

TINY = Path(__file__).parents[2] / "models" / "tiny-qwen3"
FIELDS = json.loads((TINY / "config.json").read_text())
BROKEN = [
    ([1, 2], r"holds \[1, 2\], expected an object with fields"),
    ("hi", r"holds 'hi', expected an object"),
    (3, r"holds 3, expected an object"),
    (None, r"holds None, expected an object"),
    (FIELDS | {"text_config": "abc"}, "text_config is 'abc', expected an object"),
    (FIELDS | {"text_config": FIELDS | {"rope_scaling": "yarn"}}, "rope_scaling is 'yarn', expected an object"),
    (FIELDS | {"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    (FIELDS | {"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
    (FIELDS | {"rope_parameters": 1.0}, r"rope_parameters is 1\.0, expected an object"),
    (FIELDS | {"quantization_config": "fp8"}, "quantization_config is 'fp8', expected an object"),
    (FIELDS | {"model_type": ["qwen3"]}, r"model_type is \['qwen3'\], expected a string"),
    (FIELDS | {"mlp_only_layers": 5}, "mlp_only_layers is 5, expected a list of whole numbers"),
    (FIELDS | {"mlp_only_layers": ["a"]}, r"mlp_only_layers is \['a'\], expected a list of whole numbers"),
]


@pytest.mark.parametrize(("config", "complaint"), BROKEN)
def test_what_is_not_a_models_config_is_refused_at_both_ends(tmp_path: Path, config: Any, complaint: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownBaseModelError, match=f"base model .*{tmp_path}/config.json.*{complaint}"):
        resolve(str(tmp_path), weights=False)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json.*{complaint}.*Download it again"):
        read_hf_config(tmp_path)


def test_a_field_that_is_null_is_one_that_is_left_out() -> None:
    config = FIELDS | {"rope_scaling": None, "text_config": None, "mlp_only_layers": []}
    assert checked(config, "config.json") is config


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        checked(list(range(100_000)), "config.json")
    assert len(str(caught.value)) < 250
