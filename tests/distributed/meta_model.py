"""Builds published models on the meta device, as one rank of a layout would, and counts the bytes.

    python tests/distributed/meta_model.py REQUESTS.json      # [[name, {"tp_size": 4, ...}, lora_rank], ...]

A process of its own per call: torch's fake process group of any world size cannot be undone. Prints one JSON list.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "models")]


def main(requests_file: Path) -> None:
    warnings.filterwarnings("ignore")
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_adapters import cpu_shims

    cpu_shims.install()
    requests = json.loads(requests_file.read_text())
    world_size = max(layout["tp_size"] * layout.get("dp_size", 1) for _, layout, _ in requests)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    print(json.dumps([measure(*request) for request in requests]))


def measure(name: str, layout_fields: dict[str, int], lora_rank: int) -> dict[str, Any]:
    """{"weights", "adapters", "cached_token"}: bytes on rank 0; {"trained"}: parameters over all ranks, by part."""
    import published_configs
    import torch
    from megatron.core import parallel_state

    from megatron_adapters.adapters import Adapter
    from megatron_adapters.families import check_layout, read_architecture
    from megatron_adapters.interface import Layout
    from megatron_adapters.model import build_gpt
    from megatron_adapters.placement import FIRST_RANK, stage_layers
    from megatron_adapters.projections import attention_names, projections, target_names

    layout = Layout(**layout_fields)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        expert_model_parallel_size=layout.ep_size,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        arch, _ = read_architecture(published_configs.write(name, Path(folder)))
    check_layout(arch, layout)

    def adapter(**switches: bool) -> Adapter:
        targets = target_names(
            **{"train_attn": False, "train_mlp": False, "train_unembed": False, **switches},
            attention=attention_names(arch),
        )
        device = torch.device("meta")
        wanted = projections(arch, targets, layers=stage_layers(arch.num_layers, layout, 0))
        return Adapter(
            wanted,
            rank=lora_rank,
            alpha=32.0,
            targets=targets,
            per_expert=False,
            layout=layout,
            place=FIRST_RANK,
            device=device,
        )

    with torch.device("meta"):
        gpt = build_gpt(arch, layout, torch.bfloat16, on_cpu=True)
        whole = adapter(train_attn=True, train_mlp=True, train_unembed=True)
        trained = {
            part: adapter(**{switch: True}).num_parameters
            for part, switch in (("attention", "train_attn"), ("mlp", "train_mlp"), ("unembed", "train_unembed"))
        }
    assert all(parameter.is_meta for parameter in gpt.parameters())
    buffers = (whole.weights, whole.grads, whole.exp_avg, whole.exp_avg_sq)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in gpt.parameters())
    return {
        "weights": weights,
        "adapters": sum(x.numel() * x.element_size() for x in buffers),
        "cached_token": cached_token_bytes(gpt, arch, layout),
        "trained": trained,
    }


def cached_token_bytes(gpt: Any, arch: Any, layout: Any) -> int:
    """What one sampled token keeps in the cache of rank 0, from the tensors a lane group makes."""
    import torch

    from megatron_adapters.kv_cache import KvShape, LaneGroup
    from megatron_adapters.placement import kv_heads_of_rank

    heads = kv_heads_of_rank(arch.num_kv_heads, layout.tp_size)
    meta = torch.device("meta")
    shape = KvShape(len(gpt.decoder.layers), heads, arch.head_dim, torch.bfloat16, meta, arch.value_dim)
    group = LaneGroup(shape, 64)
    group.resize(1)
    return sum(x.numel() * x.element_size() for x in (*group.keys_RHCD, *group.values_RHCD)) // 64


if __name__ == "__main__":
    main(Path(sys.argv[1]))
