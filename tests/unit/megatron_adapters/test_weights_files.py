"""Reading checkpoints and adapters: slices, complaints, and full matrices from any layout."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_adapters.adapter_files import HostCopy, assemble, own_part, owned, peft_config, read_config
from megatron_adapters.adapters import Adapter, peft_key
from megatron_adapters.expected_tensors import expected_shapes
from megatron_adapters.families import Architecture, architecture
from megatron_adapters.interface import Layout
from megatron_adapters.placement import place_of, stage_layers
from megatron_adapters.projections import projections, target_names
from megatron_adapters.training_state import copy_snapshot
from megatron_adapters.weights import Checkpoint, check_tensors, interleave_qkv
from tinker_hpc.errors import WeightsError

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SINGLE = Layout()
ALL = target_names(train_attn=True, train_mlp=True, train_unembed=True)


MOE = Qwen3MoeConfig(
    **TINY,
    head_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    decoder_sparse_step=1,
    tie_word_embeddings=False,
)


GPT_OSS = GptOssConfig(**TINY, head_dim=4, num_local_experts=4, num_experts_per_tok=2)


DEEPSEEK = DeepseekV3Config(
    **(TINY | {"num_key_value_heads": 4}),
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=6,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=3,
)


@pytest.fixture
def arch() -> Architecture:
    return architecture(Qwen3Config(**TINY, head_dim=4, tie_word_embeddings=False))


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**TINY, head_dim=4), Qwen2Config(**TINY), MOE, GPT_OSS, DEEPSEEK],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("tied", [False, True])
def test_expected_tensors_are_those_transformers_saves(config: Qwen3Config, tied: bool, tmp_path: Path) -> None:
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).shapes == expected_shapes(architecture(config))


def test_a_sharded_checkpoint_reads_like_a_whole_one(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY, head_dim=4))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    whole, parts = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert whole.shapes == parts.shapes
    for name in whole.shapes:
        assert torch.equal(whole.read(name), parts.read(name))


def test_slices_are_parts_of_the_whole(tmp_path: Path) -> None:
    full = torch.arange(48.0).view(8, 6)
    save_file({"x": full}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("x", 0, 1, 4), full[2:4])
    assert torch.equal(checkpoint.read("x", 1, 2, 3), full[:, 4:6])


def test_complaints_name_every_tensor(arch: Architecture) -> None:
    expected = expected_shapes(arch)
    found = dict(expected)
    del found["model.norm.weight"]
    found["model.layers.7.mlp.up_proj.weight"] = (24, 16)
    found["lm_head.weight"] = (31, 16)
    with pytest.raises(WeightsError) as caught:
        check_tensors(found, expected, "somewhere")
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert "lm_head.weight is [31, 16], expected [32, 16]" in message


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="names files that are not there: model-00001"):
        Checkpoint(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        Checkpoint(tmp_path)


def test_interleaving_groups_queries_with_their_key_and_value() -> None:
    q, k, v = (torch.tensor(x)[:, None] for x in ([1, 2, 3, 4], [10, 20], [100, 200]))
    assert interleave_qkv(q, k, v, groups=2).flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def build(arch: Architecture, global_rank: int = 0, layout: Layout = SINGLE, *, per_expert: bool = False) -> Adapter:
    place = place_of(global_rank, layout)
    adapter = Adapter(
        projections(arch, ALL, per_expert=per_expert, layers=stage_layers(arch.num_layers, layout, place.pp_rank)),
        rank=4,
        alpha=32.0,
        targets=ALL,
        per_expert=per_expert,
        layout=layout,
        place=place,
        device=torch.device("cpu"),
    )
    adapter.initialize(seed=9)
    return adapter


def number_b(adapter: Adapter) -> None:
    """B is zero at first, which would hide rows that are missing or twice."""
    for shard in adapter.shards:
        if "lora_B" in shard.key:
            full = torch.arange(1.0, 1 + torch.Size(shard.full_shape).numel()).view(shard.full_shape)
            shard.held(adapter.weights, adapter.place).copy_(full[shard.slice_of(adapter.place)])


def full_matrices(ranks: list[Adapter], layout: Layout) -> dict[str, torch.Tensor]:
    parts = {}
    for rank, adapter in enumerate(ranks):
        held = {shard.key: shard.held(adapter.weights, adapter.place) for shard in adapter.shards}
        if mine := owned(adapter.shards, adapter.place):
            parts[rank] = own_part(mine, held, adapter.place, adapter.weights.dtype)
    stage_size = layout.tp_size * layout.dp_size
    return assemble(parts, [ranks[stage * stage_size].shards for stage in range(layout.pp_size)], layout)


@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 1, "vocab_size": 33, "num_hidden_layers": 3}], ids=str)
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(2), Layout(1, 2), Layout(2, 2, 2), Layout(1, 2, 1, 2), Layout(2, 1, 2, 2), Layout(4, 2, 1, 4)],
    ids=str,
)
def test_shards_of_any_layout_make_the_same_full_matrices(
    layout: Layout, per_expert: bool, change: dict[str, int]
) -> None:
    """Also where ranks hold copies of a key-value head, and padding at the end of the vocabulary."""
    arch = architecture(Qwen3MoeConfig(**(MOE.to_dict() | change)))
    ranks = [build(arch, rank, layout, per_expert=per_expert) for rank in range(layout.world_size)]
    whole = build(arch, per_expert=per_expert)
    for adapter in [*ranks, whole]:
        number_b(adapter)
    joined, expected = full_matrices(ranks, layout), full_matrices([whole], SINGLE)
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[key], expected[key]) for key in expected)
    stages = ranks[:: layout.tp_size * layout.dp_size]
    assert sum(adapter.num_parameters for adapter in stages) == whole.num_parameters


def test_gradients_land_in_the_flat_buffer(arch: Architecture) -> None:
    adapter = build(arch)
    path = "model.layers.0.mlp.up_proj"
    pair = adapter.lora.pairs[path]
    for _ in range(2):  # accumulates
        (pair.a.sum() * 3.0).backward()
    shard = next(s for s in adapter.shards if s.path == path and "lora_A" in s.key)
    assert torch.equal(shard.view(adapter.grads), torch.full(shard.local_shape, 6.0))
    assert adapter.grads.sum() == 6.0 * shard.size
    adapter.zero_grad()
    assert pair.a.grad is not None and not pair.a.grad.any()


def test_a_snapshot_keeps_its_numbers(arch: Architecture) -> None:
    adapter = build(arch)
    snapshot = adapter.lora.snapshot(torch.float32)
    before = snapshot.pairs["lm_head"].a.clone()
    adapter.weights.add_(1.0)
    assert torch.equal(snapshot.pairs["lm_head"].a, before)
    assert not snapshot.pairs["lm_head"].a.requires_grad


def test_a_snapshot_leaves_a_device_that_has_no_room_for_a_copy(arch: Architecture) -> None:
    """The meta device stands for it: what is allocated there can never be read."""
    snapshot = build(arch).lora.snapshot(torch.float32)
    place, meta = place_of(0, SINGLE), torch.device("meta")
    runtime: Any = SimpleNamespace(layout=SINGLE, place=place, global_rank=0, device=meta, dtype=torch.float32)
    copy = copy_snapshot(snapshot, arch, runtime, base_model="base")
    assert len(copy.weights) == 2 * len(snapshot.pairs)
    for path, pair in snapshot.pairs.items():
        for letter, part in zip("AB", pair, strict=True):
            copied = copy.weights[peft_key(path, letter)]
            assert torch.equal(copied, part) and copied.data_ptr() != part.data_ptr()


def test_seeds_and_names_make_different_matrices(arch: Architecture) -> None:
    adapter, other = build(arch), build(arch)
    other.initialize(seed=10)
    pairs = adapter.lora.pairs
    assert not torch.equal(pairs["lm_head"].a, other.lora.pairs["lm_head"].a)
    q, k = pairs["model.layers.0.self_attn.q_proj"].a, pairs["model.layers.0.self_attn.k_proj"].a
    assert not torch.equal(q, k)


def write_adapter(folder: Path, arch: Architecture, **config: object) -> None:
    adapter = build(arch)
    save_file(full_matrices([adapter], SINGLE), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**peft_config(4, 32.0, ALL, "base"), **config}))


def test_an_adapters_targets_are_read_from_its_tensors(arch: Architecture, tmp_path: Path) -> None:
    write_adapter(tmp_path, arch, target_modules="all-linear")
    config = read_config(tmp_path, arch)
    assert (config.rank, config.alpha, config.targets) == (4, 32.0, ALL)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}])
def test_other_kinds_of_lora_are_refused(arch: Architecture, tmp_path: Path, option: dict[str, object]) -> None:
    write_adapter(tmp_path, arch, **option)
    with pytest.raises(WeightsError, match=next(iter(option))):
        read_config(tmp_path, arch)


def test_an_adapter_of_another_model_is_refused(arch: Architecture, tmp_path: Path) -> None:
    write_adapter(tmp_path, arch)
    other = architecture(Qwen3Config(**{**TINY, "num_hidden_layers": 3}, head_dim=4))
    with pytest.raises(WeightsError, match=r"missing: base_model.model.model.layers.2"):
        read_config(tmp_path, other)


def test_what_the_disk_refuses_has_the_disks_number(tmp_path: Path) -> None:
    """safetensors says it in words only; who waits for room has to know (patience.py). Here files may not grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            HostCopy({}, {"a": torch.zeros(1000)}, {}, 0).write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.errno == errno.EFBIG
