"""The model that the benchmarks train where they need one of a known size: a random Qwen3 of 12 layers x 512."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """57 million parameters; what a benchmark adds to it is in its own subclass."""

    num_layers: int = 12
    hidden_size: int = 512
    ffn_size: int = 1536
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    vocab_size: int = 8192
    seed: int = 0

    def make(self, folder: Path, **more: Any) -> Path:
        """Write it below `folder`; its path. `more`: further fields of config.json."""
        import random_models

        return random_models.make(
            "qwen3", folder,
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=self.ffn_size,
            num_hidden_layers=self.num_layers, num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads, head_dim=self.head_dim, max_position_embeddings=2048, **more,
        )  # fmt: skip


SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
"""For --quick: does the benchmark still run?"""
