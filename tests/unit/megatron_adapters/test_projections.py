"""The number of trainable parameters against the published table, digit for digit, and the names against PEFT's."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, Qwen3Config

from megatron_adapters.adapters import shard_layout
from megatron_adapters.families import Architecture, architecture
from megatron_adapters.interface import Layout
from megatron_adapters.projections import parameters_per_rank, projections, target_names

ALL = {"train_attn": True, "train_mlp": True, "train_unembed": True}


def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> Architecture:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=128256,
    )
    return architecture(config)


def qwen3(layers: int, hidden: int, ffn: int, heads: int) -> Architecture:
    config = Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    return architecture(config)


# Sizes from the models' published config.json; counts per unit of rank from the cookbook's table.
PUBLISHED = {
    "Llama-3.2-1B": (llama(16, 2048, 8192, 32, 8), 491_520, 212_992, 130_304),
    "Llama-3.1-8B": (llama(32, 4096, 14336, 32, 8), 1_769_472, 851_968, 132_352),
    "Llama-3.1-70B": (llama(80, 8192, 28672, 64, 8), 8_847_360, 4_096_000, 136_448),
    "Qwen3-8B": (qwen3(36, 4096, 12288, 32), 1_769_472, 958_464, 156_032),
    "Qwen3-32B": (qwen3(64, 5120, 25600, 64), 5_898_240, 2_490_368, 157_056),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_formula_gives_the_published_counts(name: str) -> None:
    arch, mlp, attention, unembed = PUBLISHED[name]
    off = dict.fromkeys(ALL, False)
    assert parameters_per_rank(arch, **{**off, "train_mlp": True}) == mlp
    assert parameters_per_rank(arch, **{**off, "train_attn": True}) == attention
    assert parameters_per_rank(arch, **{**off, "train_unembed": True}) == unembed
    assert parameters_per_rank(arch, **ALL) == mlp + attention + unembed


@pytest.mark.parametrize("name", list(PUBLISHED))
@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_matrices_hold_as_many_parameters_as_the_formula_says(name: str, tp_size: int) -> None:
    arch = PUBLISHED[name][0]
    shards = shard_layout(projections(arch, target_names(**ALL)), 32, Layout(tp_size))
    total = sum(shard.size * (1 if shard.split_dim is None else tp_size) for shard in shards)
    assert total == 32 * parameters_per_rank(arch, **ALL)
    assert total == 32 * sum(PUBLISHED[name][1:])


def test_tied_embeddings_do_not_change_the_count() -> None:
    config = Qwen3Config(vocab_size=1000, hidden_size=64, tie_word_embeddings=True)
    assert parameters_per_rank(architecture(config), train_attn=False, train_mlp=False, train_unembed=True) == 1064


def test_names_are_pefts() -> None:
    arch = llama(1, 64, 96, 4, 2)
    keys = {shard.key for shard in shard_layout(projections(arch, target_names(**ALL)), 8, Layout())}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight" in keys
    assert "base_model.model.lm_head.lora_A.weight" in keys
    assert len(keys) == 2 * 8


def test_switches_select_whole_blocks() -> None:
    assert target_names(train_attn=True, train_mlp=False, train_unembed=False) == (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    assert target_names(train_attn=False, train_mlp=False, train_unembed=True) == ("lm_head",)
