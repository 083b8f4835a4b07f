"""Stacked experts as peft takes them: names, bytes, and factors that all share. More of peft: tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import random_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tinker_hpc.errors import ConfigError
from tinker_hpc.merged_export import export_merged
from tinker_hpc.peft_experts import expand_experts, has_stacked_experts
from tinker_hpc.peft_export import BASE_EXPERTS, FUSED, export_adapter

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


@pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore:::torch")
@pytest.mark.parametrize("shared", [True, False])
def test_peft_loads_fused_experts(shared: bool, tmp_path: Path) -> None:
    """gpt-oss: peft with the export computes what transformers does with the merged model; experts alone adapted."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rank, experts, hidden, ffn = 3, 4, 64, 96
    base = random_models.make("gpt_oss", tmp_path)
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, (d_out, d_in) in {"w1": (ffn, hidden), "w3": (ffn, hidden), "w2": (hidden, ffn)}.items():
            for letter, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                count = 1 if shared and (letter == "B") == (name == "w2") else experts
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{name}.lora_{letter}.weight"
                tensors[key] = torch.randn(count, *shape, generator=generator) * 0.1
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": ["down_proj", "gate_proj", "up_proj"]}
    for folder in (saved, exported):
        folder.mkdir()
    save_file(tensors, saved / "adapter_model.safetensors", metadata={"format": "pt", BASE_EXPERTS: FUSED})
    (saved / "adapter_config.json").write_text(json.dumps(config))
    export_adapter(saved, exported)

    tokens = torch.arange(3, 30)[None]
    merged, plain = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (export_merged(base, saved, tmp_path / "merged"), base)
    )
    with torch.no_grad():
        expected, without = merged(tokens).logits, plain(tokens).logits
        ours = PeftModel.from_pretrained(plain, str(exported)).eval()(tokens).logits
    assert (expected - without).abs().max() > 0.1
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()
