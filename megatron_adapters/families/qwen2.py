"""Qwen2 and Qwen2.5: Llama with biases on q, k and v; small sizes tie the embeddings."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder


def architecture(hf_config: Any) -> Architecture:
    return decoder(hf_config, qkv_bias=True)
