"""Qwen3, dense: norms on the heads of q and k, and a head size of its own."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, decoder


def architecture(hf_config: Any) -> Architecture:
    return decoder(hf_config, qk_norm=True)
