"""Merged export against transformers + peft: the same logits, the same rounding, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantised_models
import random_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tinker_hpc import safetensors_file
from tinker_hpc.cli.main import main
from tinker_hpc.errors import ConfigError, DataRootError, WeightsError
from tinker_hpc.merged_export import export_merged
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import checkpoint_folder
from tinker_hpc.safetensors_file import TensorFile, as_bytes, as_float32

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore:::torch")

TOKENS = torch.arange(3, 40)[None]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
RANK, ALPHA = 8, 32


def make_base(family: str, folder: Path, *, max_shard_size: str = "5GB", dtype: str = "float32") -> Path:
    model = random_models.build(family).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def make_adapter(base: Path, folder: Path, targets: list[str]) -> Any:
    """A peft adapter with random A and B, saved to `folder`; the peft model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.05)
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return peft.eval()


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("family", "max_shard_size", "targets"),
    [
        ("llama", "5GB", TARGETS),
        ("qwen3", "200KB", TARGETS),
        ("qwen2", "5GB", TARGETS),  # tied embeddings: the unembedding becomes one of its own
        ("qwen2", "200KB", ["q_proj", "down_proj"]),  # tied ones stay tied
    ],
)
def test_logits_equal_base_and_adapter(family: str, max_shard_size: str, targets: list[str], tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base", max_shard_size=max_shard_size)
    peft = make_adapter(base, tmp_path / "adapter", targets)
    told: list[tuple[int, int]] = []
    merged = export_merged(
        base, tmp_path / "adapter", tmp_path / "merged", written=lambda done, total: told.append((done, total))
    )
    with torch.no_grad():
        expected = peft(TOKENS).logits
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 10_000
    assert (logits_of(merged) - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (logits_of(base) - expected).abs().max() > 0.01, "the adapter does something"
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in merged.iterdir()} == names, "the same files as the base"
    tied = json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (family == "qwen2" and "lm_head" not in targets)
    if max_shard_size == "200KB":
        weights = json.loads((merged / "model.safetensors.index.json").read_text())
        assert len(set(weights["weight_map"].values())) > 2
        assert weights["metadata"]["total_size"] == sum(
            tensor.nbytes for path in merged.glob("*.safetensors") for tensor in load_file(path).values()
        )


def test_bfloat16_rounds_once_and_leaves_the_rest(tmp_path: Path) -> None:
    base = make_base("qwen3", tmp_path / "base", dtype="bfloat16")
    make_adapter(base, tmp_path / "adapter", ["v_proj"])
    merged = load_file(export_merged(base, tmp_path / "adapter", tmp_path / "merged") / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, before in load_file(base / "model.safetensors").items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if "v_proj" not in name:
            assert torch.equal(merged[name], before)
            continue
        a, b = (factors[f"{path}.lora_{letter}.weight"].double() for letter in "AB")
        exact = before.double() + ALPHA / RANK * b @ a
        # Half a unit in the last place of bfloat16, and a little of float32.
        assert ((merged[name].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint as the worker leaves it, exported by name and loaded by transformers."""
    monkeypatch.setenv("TINKER_HPC_DATA_ROOT", str(tmp_path / "root"))
    base = make_base("qwen3", tmp_path / "base")
    saved = checkpoint_folder(tmp_path / "root", "s-1:train:0", "weights", "end")
    peft = make_adapter(base, saved, TARGETS)
    write_json(saved / "checkpoint.json", {"base_model": str(base), "created_at": 5.0, "model_id": "s-1:train:0"})
    argv = ["export", "tinker://s-1:train:0/weights/end", "--merged", "--to", str(tmp_path / "merged"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    folder = Path(json.loads(capsys.readouterr().out)["folder"])
    with torch.no_grad():
        expected = peft(TOKENS).logits
    assert (logits_of(folder) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_experts(stacked: bool, tmp_path: Path) -> None:
    """Experts' matrices of the base, by the definition: W_e + alpha / rank * B_e A_e, outer factors shared."""
    experts, hidden, ffn = 3, 16, 24
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    block = "model.layers.0.mlp.experts"
    widths = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    base = {f"{block}.{e}.{name}.weight": random(*shape) for e in range(experts) for name, shape in widths.items()}
    base["model.layers.0.mlp.gate.weight"] = random(experts, hidden)
    stacks = {}
    for name, (d_out, d_in) in widths.items():
        shared_a = name != "down_proj"
        stacks[name] = (random(1 if shared_a else experts, 4, d_in), random(experts if shared_a else 1, d_out, 4))
    adapter = {}
    for name, (a, b) in stacks.items():
        for letter, stack in (("A", a), ("B", b)):
            short = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[name]
            if stacked:
                adapter[f"base_model.model.{block}.{short}.lora_{letter}.weight"] = stack
            else:
                for e in range(experts):
                    key = f"base_model.model.{block}.{e}.{name}.lora_{letter}.weight"
                    adapter[key] = stack[min(e, len(stack) - 1)].clone()
    for folder, tensors in (("base", base), ("adapter", adapter)):
        (tmp_path / folder).mkdir()
        name = "model.safetensors" if folder == "base" else "adapter_model.safetensors"
        save_file(tensors, tmp_path / folder / name)
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    merged = load_file(
        export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") / "model.safetensors"
    )
    for e in range(experts):
        for name, (a, b) in stacks.items():
            expected = base[f"{block}.{e}.{name}.weight"] + 2.0 * b[min(e, len(b) - 1)] @ a[min(e, len(a) - 1)]
            assert torch.allclose(merged[f"{block}.{e}.{name}.weight"], expected, atol=1e-5)
    assert torch.equal(merged["model.layers.0.mlp.gate.weight"], base["model.layers.0.mlp.gate.weight"])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_quantised_base_is_merged_into_bfloat16(family: str, tmp_path: Path) -> None:
    """What transformers dequantises, plus alpha / rank * B A of each expert, rounded once; and nothing else changes."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    plain, base = random_models.make(family, tmp_path), tmp_path / "base"
    if family == "gpt_oss":
        quantisation: Any = Mxfp4Config(dequantize=True)
        quantised_models.write_mxfp4(plain, base)
    else:
        quantisation = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))
        quantised_models.write_fp8(plain, base, (8, 8))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantisation)
    block = "model.layers.1.mlp.experts"
    experts, hidden, ffn = 4, 64, theirs.get_parameter(f"{block}.down_proj").numel() // (4 * 64)
    generator = torch.Generator().manual_seed(0)
    factors, deltas = {}, {}
    for name, (d_out, d_in) in {"w1": (ffn, hidden), "w3": (ffn, hidden), "w2": (hidden, ffn)}.items():
        counts = (experts, 1) if name == "w2" else (1, experts)
        a, b = (
            torch.randn(count, *shape, generator=generator) * 0.1
            for count, shape in zip(counts, ((RANK, d_in), (d_out, RANK)), strict=True)
        )
        factors |= {f"base_model.model.{block}.{name}.lora_{letter}.weight": x for letter, x in (("A", a), ("B", b))}
        deltas[name] = (ALPHA / RANK * b.double() @ a.double()).expand(experts, -1, -1)
    if family == "gpt_oss":  # [experts, in, out], gate and up taking turns
        gate_up, down = torch.stack((deltas["w1"], deltas["w3"]), dim=2).flatten(1, 2).mT, deltas["w2"].mT
    else:
        gate_up, down = torch.cat((deltas["w1"], deltas["w3"]), dim=1), deltas["w2"]
    added = {f"{block}.gate_up_proj": gate_up, f"{block}.down_proj": down}
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))

    merged = export_merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()] and set(added) < set(names)
    for name, parameter in ours.named_parameters():
        exact = theirs.get_parameter(name).double() + added.get(name, 0.0)
        assert ((parameter.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), name
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert not any("scale" in name or "_blocks" in name for name in index["weight_map"])


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model sixty times as large as a block never has more than a few blocks in memory."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 1 << 20)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    rows, columns = 8192, 1024
    save_file(
        {name: torch.zeros(rows, columns) for name in ("lm_head.weight", "other.weight")},
        tmp_path / "base" / "model.safetensors",
    )
    (tmp_path / "base" / "config.json").write_text("{}")
    factors = {"base_model.model.lm_head.lora_A.weight": torch.ones(2, columns)}
    factors["base_model.model.lm_head.lora_B.weight"] = torch.ones(rows, 2)
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    tracemalloc.start()
    try:
        merged = export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    with TensorFile(merged / "model.safetensors") as file:
        assert (file.read("lm_head.weight", slice(5000, 5002)) == 2.0).all()
        assert not file.read("other.weight", slice(0, 2)).any()


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", ["q_proj"])
    other = tmp_path / "other"
    random_models.build("llama", hidden_size=96, num_hidden_layers=2).save_pretrained(other)
    with pytest.raises(WeightsError, match=r"q_proj\.weight is \[96, 96\], but the adapter's A is \[8, 64\]"):
        export_merged(other, tmp_path / "adapter", tmp_path / "merged")
    random_models.build("llama", num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    with pytest.raises(WeightsError, match=r"2 in all: .*layers\.1\.self_attn\.q_proj"):
        export_merged(tmp_path / "shallow", tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="holds neither"):
        export_merged(tmp_path / "empty", tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "empty", "other", "shallow"]
    with pytest.raises(ConfigError, match="exists already"):
        export_merged(base, tmp_path / "adapter", tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(DataRootError, match="cannot write"):
        export_merged(base, tmp_path / "adapter", tmp_path / "file" / "merged")


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"\x01")
    with pytest.raises(WeightsError, match="as safetensors"):
        TensorFile(tmp_path / "short")
    save_file({"x": torch.zeros(4, dtype=torch.int64)}, tmp_path / "ints")
    with TensorFile(tmp_path / "ints") as file, pytest.raises(WeightsError, match="stored as I64"):
        file.read("x")
    whole = tmp_path / "whole"
    save_file({"x": torch.zeros(1000)}, whole)
    whole.write_bytes(whole.read_bytes()[:-8])
    with TensorFile(whole) as file, pytest.raises(WeightsError, match="shorter than its header"):
        file.read("x")


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_rounding_is_torchs(values: list[float]) -> None:
    """Every kind of number: ties, denormals, infinities, NaN."""
    ours = np.array(values, np.float32)
    for dtype, theirs in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        with np.errstate(over="ignore"):
            back = as_float32(as_bytes(ours, dtype), dtype)
        expected = torch.from_numpy(ours).to(theirs).float().numpy()
        assert np.array_equal(back, expected, equal_nan=True), dtype
