"""Llama 3.x: grouped-query attention, gated MLP, rope with its own scaling, nothing else."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder


def architecture(hf_config: Any) -> Architecture:
    return decoder(hf_config)
