"""Stacked experts' matrices of an adapter file -> peft's form for fused parameters of all experts (gpt-oss).

peft (0.21, ParamWrapper) and vLLM ("3D" adapters) hold, for all experts of a layer, A as [E * R, in] with the expert
slowest and B as [out, R * E] with the expert fastest: of down_proj as `experts.lora_A`, `experts.lora_B`, of
gate_up_proj as `experts.base_layer.lora_A`, `experts.base_layer.lora_B`. Gate and up are one matrix there, whose
outputs take turns; so their A are put one under the other, of rank 2 R, and B is zero where they would mix.

Shapes: E experts, R rank, in and out of a matrix. A stack of one is shared by all experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc.safetensors_file import TensorFile, as_bytes, write_tensors

_STACK = re.compile(r"(?P<layer>.*\.mlp\.experts)\.w[123]\.lora_[AB]\.weight")
_MLP = ("gate_proj", "up_proj", "down_proj")
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

Make = Callable[[], np.ndarray]


def write_parameters(source: Path, target: Path) -> None:
    """Write `source` with its stacks in peft's form to `target`; other tensors as they are. One tensor is in memory.

    Raises: WeightsError if source is not a safetensors file; OSError.
    """
    with TensorFile(source) as file:
        entries: dict[str, tuple[str, tuple[int, ...], Iterator[bytes]]] = {}
        layers: dict[str, None] = {}
        for name, info in file.tensors.items():
            if match := _STACK.fullmatch(name):
                layers[match["layer"]] = None
            else:
                entries[name] = (info.dtype, info.shape, file.blocks(name))
        for layer in layers:
            dtype = file.tensors[f"{layer}.w1.lora_A.weight"].dtype
            for name, shape, make in _of_layer(file, layer):
                entries[name] = (dtype, shape, _piece(make, dtype))
        write_tensors(target, entries, {"format": "pt"})


def parameters_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json for what `write_parameters` writes, from that of the adapter it is made of."""
    return {
        **config,
        "target_modules": [name for name in config["target_modules"] if name not in _MLP],
        "target_parameters": [_GATE_UP, _DOWN],
        "rank_pattern": {_GATE_UP: 2 * config["r"]},
        "alpha_pattern": {_GATE_UP: 2 * config["lora_alpha"]},
    }


def _of_layer(file: TensorFile, layer: str) -> Iterator[tuple[str, tuple[int, ...], Make]]:
    """Name, shape and numbers of the four tensors of a layer."""

    def stack(name: str) -> np.ndarray:
        """[E, ...]"""
        values = file.read(f"{layer}.{name}.weight")
        return np.broadcast_to(values, (num_experts, *values.shape[1:]))

    def gate_up_a() -> np.ndarray:
        return np.concatenate([stack("w1.lora_A"), stack("w3.lora_A")], axis=1).reshape(-1, hidden)

    def gate_up_b() -> np.ndarray:
        both = np.zeros((2 * ffn, 2 * rank, num_experts), np.float32)
        both[0::2, :rank] = stack("w1.lora_B").transpose(1, 2, 0)
        both[1::2, rank:] = stack("w3.lora_B").transpose(1, 2, 0)
        return both

    def down_a() -> np.ndarray:
        return stack("w2.lora_A")

    def down_b() -> np.ndarray:
        return stack("w2.lora_B").transpose(1, 2, 0)

    num_experts, ffn, rank = file.tensors[f"{layer}.w1.lora_B.weight"].shape
    hidden = file.tensors[f"{layer}.w1.lora_A.weight"].shape[2]
    gate_up = f"{layer}.base_layer"
    yield f"{gate_up}.lora_A.weight", (num_experts * 2 * rank, hidden), gate_up_a
    yield f"{gate_up}.lora_B.weight", (2 * ffn, 2 * rank * num_experts), gate_up_b
    yield f"{layer}.lora_A.weight", (num_experts * rank, ffn), down_a
    yield f"{layer}.lora_B.weight", (hidden, rank * num_experts), down_b


def _piece(make: Make, dtype: str) -> Iterator[bytes]:
    yield as_bytes(make(), dtype)
