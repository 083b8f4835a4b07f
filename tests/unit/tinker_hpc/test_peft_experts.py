"""Stacked experts taken apart: names, bytes, and a factor that all experts share. peft itself: tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tinker_hpc.errors import ConfigError
from tinker_hpc.peft_experts import expand_experts, has_stacked_experts

LAYER = "base_model.model.model.layers.0."


def test_every_expert_gets_its_own_matrices(tmp_path: Path) -> None:
    tensors = {
        f"{LAYER}self_attn.q_proj.lora_A.weight": torch.randn(2, 5),
        f"{LAYER}mlp.experts.w1.lora_A.weight": torch.randn(1, 2, 5),
        f"{LAYER}mlp.experts.w1.lora_B.weight": torch.randn(3, 4, 2),
        f"{LAYER}mlp.experts.w2.lora_A.weight": torch.randn(3, 2, 4).bfloat16(),
        f"{LAYER}mlp.experts.w2.lora_B.weight": torch.randn(1, 5, 2),
    }
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source, metadata={"format": "pt"})
    assert has_stacked_experts(source)
    expand_experts(source, target)
    assert not has_stacked_experts(target)
    found = load_file(target)
    assert len(found) == 1 + 4 * 3
    q_proj = f"{LAYER}self_attn.q_proj.lora_A.weight"
    assert torch.equal(found[q_proj], tensors[q_proj])
    for expert in range(3):
        for short, name in (("w1", "gate_proj"), ("w2", "down_proj")):
            for letter in "AB":
                stack = tensors[f"{LAYER}mlp.experts.{short}.lora_{letter}.weight"]
                own = stack[expert if len(stack) > 1 else 0]
                assert torch.equal(found[f"{LAYER}mlp.experts.{expert}.{name}.lora_{letter}.weight"], own)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "expert_lora": "shared_outer"}


def test_experts_that_share_nothing_are_not_said_to(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    keys = [f"{LAYER}mlp.experts.w3.lora_{letter}.weight" for letter in "AB"]
    save_file({key: torch.randn(3, 2, 2) for key in keys}, source, metadata={"format": "pt"})
    expand_experts(source, target)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        has_stacked_experts(tmp_path / "a.safetensors")
