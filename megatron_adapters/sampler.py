"""Step 6 of a request, sampling. Before: engine.py. After: decode.py, then own_sequences.py.

Puts the decode loop together for one engine: the model, a cache planned into the free memory, the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from .adapters import LoraWeights
from .decode import Decoder
from .free_memory import free_memory
from .kv_cache import KvCache, KvShape
from .model import Model
from .placement import kv_heads_of_rank
from .sample_ranks import SampleRanks
from .sampler_forward import ModelForward
from .stopping import DecodeText

CUDA_SHARE = 0.6
"""Of the device memory free when sampling first starts; the rest is for training's activations."""
CPU_SHARE = 0.25
"""Of the memory free to this node's or job's processes, divided among the local ranks."""
MAX_ROWS = 256


def make_decoder(model: Model, snapshots: Mapping[str, LoraWeights], base_model_folder: Path) -> Decoder:
    """The decode loop of this rank.

    Args: snapshots: by id; read live, so later snapshots are known too.
    Collectives: one all-reduce over the control group: all ranks plan for the smallest budget.
    """
    runtime, arch = model.runtime, model.arch
    ranks = SampleRanks(
        tp_size=runtime.layout.tp_size,
        tp_rank=runtime.tp_rank,
        tp_group=runtime.tp_group,
        dp_size=runtime.layout.dp_size,
        dp_rank=runtime.dp_rank,
        pp_size=runtime.layout.pp_size,
        pp_rank=runtime.place.pp_rank,
        pp_group=runtime.forward_group,
        control_group=runtime.control_group,
    )
    shape = KvShape(
        num_layers=len(model.layers),
        num_kv_heads=kv_heads_of_rank(arch.num_kv_heads, runtime.layout.tp_size),
        head_dim=arch.head_dim,
        value_dim=arch.value_dim,
        dtype=runtime.dtype,
        device=runtime.device,
    )
    budget_tokens = ranks.agree_on_least(memory_for_cache(runtime.device) // shape.bytes_per_token)
    budget_tokens = min(budget_tokens, MAX_ROWS * arch.max_context)
    return Decoder(
        ModelForward(model, snapshots),
        KvCache(shape, budget_tokens, arch.max_context, MAX_ROWS),
        ranks,
        vocab_size=arch.vocab_size,
        known_snapshots=lambda: snapshots,
        decode_text=lambda: load_decode_text(base_model_folder),
    )


def memory_for_cache(device: torch.device) -> int:
    """Bytes this rank may cache. They are allocated only as sequences need them."""
    return int((CUDA_SHARE if device.type == "cuda" else CPU_SHARE) * free_memory(device))


@cache
def load_decode_text(base_model_folder: Path) -> DecodeText:
    """The model's own tokenizer as token ids -> text, special tokens kept.

    Raises: an Exception of any kind where the folder has no tokenizer that loads.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model_folder, local_files_only=True)

    def decode_text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode_text
