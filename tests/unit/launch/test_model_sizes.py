"""Sizes from config.json against the published counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published_configs import PUBLISHED
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from launch.model_sizes import Split, adapter_parameters, base_parameters, read_sizes
from tinker_hpc.errors import ConfigError

# Tinker cookbook's table (hyperparam_utils.py): trainable parameters per unit of rank.
PER_RANK = {
    "Llama-3.2-1B": {"mlp": 491_520, "attention": 212_992, "unembed": 130_304},
    "Llama-3.1-8B": {"mlp": 1_769_472, "attention": 851_968, "unembed": 132_352},
    "Llama-3.1-70B": {"mlp": 8_847_360, "attention": 4_096_000, "unembed": 136_448},
    "Qwen3-8B": {"mlp": 1_769_472, "attention": 958_464, "unembed": 156_032},
    "Qwen3-32B": {"mlp": 5_898_240, "attention": 2_490_368, "unembed": 157_056},
    "Qwen3-30B-A3B": {"mlp": 14_450_688, "attention": 835_584, "unembed": 153_984},
    "Qwen3-235B-A22B": {"mlp": 56_598_528, "attention": 3_176_448, "unembed": 156_032},
}
# The models' own cards: parameters in all, and active per token (with the embedding).
BILLIONS = {
    "Llama-3.2-1B": 1.24,
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "Qwen3-8B": 8.19,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235.1,
    "DeepSeek-V3": 671.0,
    "Moonlight-16B-A3B": 15.96,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
}


@pytest.mark.parametrize("name", list(PER_RANK))
def test_trainable_parameters_to_the_digit(name: str) -> None:
    sizes = read_sizes(PUBLISHED[name])
    assert adapter_parameters(sizes, Split(), 1) == PER_RANK[name]
    assert adapter_parameters(sizes, Split(), 32, train_mlp=False) == {
        "attention": 32 * PER_RANK[name]["attention"],
        "mlp": 0,
        "unembed": 32 * PER_RANK[name]["unembed"],
    }


@pytest.mark.parametrize("name", list(BILLIONS))
def test_parameters_of_the_base(name: str) -> None:
    assert read_sizes(PUBLISHED[name]).num_parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


def test_active_parameters() -> None:
    assert read_sizes(PUBLISHED["Qwen3-30B-A3B"]).num_active_parameters / 1e9 == pytest.approx(3.0, rel=0.03)
    assert read_sizes(PUBLISHED["Qwen3-235B-A22B"]).num_active_parameters / 1e9 == pytest.approx(21.5, rel=0.03)
    assert read_sizes(PUBLISHED["gpt-oss-20b"]).num_active_parameters / 1e9 == pytest.approx(3.61, rel=0.01)
    assert read_sizes(PUBLISHED["gpt-oss-120b"]).num_active_parameters / 1e9 == pytest.approx(5.13, rel=0.01)
    tied = read_sizes(PUBLISHED["Llama-3.2-1B"])
    assert tied.num_active_parameters == tied.num_parameters


SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False}
SMALL_EXPERTS = SMALL | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize("config", [Qwen3Config(**SMALL), Qwen3MoeConfig(**SMALL_EXPERTS)], ids=["dense", "experts"])
def test_flops_of_a_trained_token_are_those_torch_counts(config: Any) -> None:
    """Of transformers' own model, frozen, forward and backward: the products of matrices."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation="eager")
    hidden = torch.randn(1, 48, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(inputs_embeds=hidden, use_cache=False).logits.sum().backward()
    sizes = read_sizes(config.to_dict())
    assert 48 * sizes.flops_per_trained_token == counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    # By hand, for the dense one: q and o, k and v, the MLP; the unembedding.
    if not sizes.num_experts:
        assert sizes.flops_per_trained_token == 4 * (2 * 64 * (2 * 128 + 2 * 64 + 3 * 96) + 256 * 64)


@pytest.mark.parametrize("name", list(PER_RANK))
def test_ranks_together_hold_the_model(name: str) -> None:
    """Over TP and EP every weight matrix is somewhere exactly once; norms and router are on every rank."""
    sizes = read_sizes(PUBLISHED[name])
    whole = base_parameters(sizes, Split())
    parts = base_parameters(sizes, Split(tp_size=4, ep_size=8 if sizes.num_experts else 1))
    assert {key: 4 * parts[key] for key in ("attention", "mlp", "embeddings")} == {
        key: whole[key] for key in ("attention", "mlp", "embeddings")
    }
    assert parts["experts"] * (8 if sizes.num_experts else 1) == whole["experts"]
    assert (parts["norms"], parts["router"]) == (whole["norms"], whole["router"])


def test_dense_layers_among_experts() -> None:
    config = PUBLISHED["Qwen3-30B-A3B"] | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    sizes = read_sizes(config)
    assert (sizes.num_dense_layers, sizes.num_expert_layers) == (25, 23)
    assert base_parameters(sizes, Split())["mlp"] == 25 * 3 * 2048 * 6144


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_size": None}, "has no hidden_size"), ({"vocab_size": "many"}, "vocab_size is 'many'")],
)
def test_fields_that_are_missing(change, words) -> None:
    with pytest.raises(ConfigError, match=words):
        read_sizes(PUBLISHED["Qwen3-8B"] | change)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Qwen3-8B", "num_hidden_layers", 0),
        ("Qwen3-8B", "num_attention_heads", 0),
        ("Qwen3-8B", "num_key_value_heads", 0),
        ("Qwen3-8B", "intermediate_size", 0),
        ("Qwen3-8B", "head_dim", 0),
        ("Qwen3-8B", "vocab_size", True),
        ("Qwen3-30B-A3B", "num_experts", "many"),
        ("Qwen3-30B-A3B", "moe_intermediate_size", 0),
        ("Qwen3-30B-A3B", "num_experts_per_tok", 0),
        ("Qwen3-30B-A3B", "decoder_sparse_step", "two"),
        ("Qwen3-30B-A3B", "decoder_sparse_step", 0),
        ("DeepSeek-V3", "first_k_dense_replace", "x"),
        ("DeepSeek-V3", "kv_lora_rank", 0),
    ],
)
def test_sizes_that_are_no_positive_numbers(name: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"here/config.json: {field} is {value!r}, expected a whole number, at least"):
        read_sizes(PUBLISHED[name] | {field: value}, "here/config.json")


def test_sizes_that_may_be_none() -> None:
    """No experts, no width of a dense MLP where every layer has experts, queries from the hidden state."""
    assert read_sizes(PUBLISHED["Qwen3-8B"] | {"num_experts": 0}) == read_sizes(PUBLISHED["Qwen3-8B"])
    assert read_sizes(PUBLISHED["Qwen3-30B-A3B"] | {"intermediate_size": 0}).ffn_size == 0
    latent = read_sizes(PUBLISHED["DeepSeek-V3"] | {"q_lora_rank": None}).latent
    assert latent is not None and latent.q_rank == 0
