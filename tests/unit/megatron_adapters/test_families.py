"""Which models and layouts are taken, and what is said about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_adapters import families
from megatron_adapters.families import FAMILIES, architecture, check_layout, read_architecture
from megatron_adapters.interface import Layout
from megatron_adapters.rope import RotaryTable, rotate
from tinker_hpc.errors import ConfigError


def test_every_family_has_the_file_of_its_name() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")}
    assert set(FAMILIES) == files - {"__init__", "architecture", "layouts"}
    assert all(callable(family.architecture) for family in FAMILIES.values())


def test_an_unknown_model_type_is_told_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r"model_type 'gpt2'.*Supported: deepseek_v3, gpt_oss, llama, qwen2, qwen3"):
        read_architecture(tmp_path)


def test_a_family_that_megatron_cannot_carry_is_told_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe"}))
    with pytest.raises(ConfigError, match=r"'qwen3_5_moe'.*gated delta nets.*megatron-core 0\.16\.1"):
        read_architecture(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        read_architecture(tmp_path)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (Qwen2Config(use_sliding_window=True), "use_sliding_window"),
        (LlamaConfig(attention_bias=True), "attention_bias"),
        (LlamaConfig(mlp_bias=True), "mlp_bias"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act 'gelu'"),
        (GptOssConfig(quantization_config={"quant_method": "bitsandbytes"}), "stored quantised .*bitsandbytes"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic'",
        ),
    ],
)
def test_switches_we_do_not_implement_are_refused(config: LlamaConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        architecture(config)


def test_end_of_turn_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    Qwen3Config(eos_token_id=5).save_pretrained(tmp_path)
    assert read_architecture(tmp_path)[0].eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert read_architecture(tmp_path)[0].eos_token_ids == (7, 5)


def test_a_tensor_parallel_size_that_does_not_divide_says_which_do() -> None:
    sizes = {"num_attention_heads": 24, "num_key_value_heads": 4, "intermediate_size": 96}
    arch = architecture(Qwen3Config(**sizes, vocab_size=1001))
    for size in (4, 8):  # copies of key-value heads, and a padded vocabulary
        check_layout(arch, Layout(tp_size=size))
    with pytest.raises(ConfigError, match=r"3 does not divide num_key_value_heads \(4\).*work: 1, 2, 4, 8, 12, 24"):
        check_layout(arch, Layout(tp_size=3))
    with pytest.raises(ConfigError, match=r"num_attention_heads \(24\), intermediate_size \(96\)"):
        check_layout(arch, Layout(tp_size=64))
    with pytest.raises(ConfigError, match=r"vocab_size \(9\)"):  # the last rank would have none of it
        check_layout(architecture(Qwen3Config(**sizes, vocab_size=9)), Layout(tp_size=8))
    check_layout(arch, Layout(pp_size=arch.num_layers - 1))
    with pytest.raises(ConfigError, match="pp_size 33 is more than the 32 layers"):
        check_layout(arch, Layout(pp_size=33))
    with pytest.raises(ConfigError, match="at least 1"):
        check_layout(arch, Layout(dp_size=0))


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", list(ROPES))
def test_rotation_equals_transformers(kind: str) -> None:
    """Bit for bit in float32, at positions far beyond the original context."""
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=ROPES[kind]
    )
    positions = torch.tensor([0, 1, 63, 64, 200, 255])
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(6, 2, 32, generator=generator) for _ in range(2))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    theirs = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
    table = RotaryTable(config, 32, torch.device("cpu")).cos_sin(positions)
    for ours, other in zip((rotate(q, *table), rotate(k, *table)), theirs, strict=True):
        assert torch.equal(ours, other[0].transpose(0, 1))
