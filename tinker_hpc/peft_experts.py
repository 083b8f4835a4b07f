"""Stacked experts' matrices of an adapter file -> one matrix per expert, as peft and vLLM load them.

A stack [E, rows, columns] holds its experts one after the other, so this is a matter of names and bytes: no number is
computed, and nothing larger than one expert's matrix is held. A factor that all experts share, [1, rows, columns], is
written once for each.
File format: github.com/huggingface/safetensors (u64 length, JSON header, bytes).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tinker_hpc.errors import ConfigError

SHARING, SHARED_OUTER = "expert_lora", "shared_outer"
"""In the metadata of an export whose experts share a factor, so that loading it again gives the same adapter."""

_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_STACK = re.compile(r"(?P<before>.*\.mlp\.experts\.)(?P<name>w[123])\.(?P<after>lora_[AB]\.weight)")


def has_stacked_experts(path: Path) -> bool:
    with path.open("rb") as file:
        return any(_STACK.fullmatch(name) for name in _read_header(file, path)[0])


def expand_experts(source: Path, target: Path) -> None:
    """Write `source` with its stacks taken apart to `target`; other tensors as they are.

    Raises: ConfigError if source is not a safetensors file; OSError.
    """
    with source.open("rb") as file:
        header, start = _read_header(file, source)
        metadata = header.pop("__metadata__", {})
        stacks = {name: match["before"] for name in header if (match := _STACK.fullmatch(name))}
        counts: dict[str, int] = {}
        for name, layer in stacks.items():
            counts[layer] = max(counts.get(layer, 1), header[name]["shape"][0])
        shared = any(header[name]["shape"][0] < counts[layer] for name, layer in stacks.items())
        pieces = [piece for name, info in sorted(header.items()) for piece in _pieces(name, info, counts)]
        new: dict[str, Any] = {"__metadata__": {**metadata, SHARING: SHARED_OUTER} if shared else metadata}
        position = 0
        for name, dtype, shape, _, size in pieces:
            new[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(new, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as output:
            output.write(struct.pack("<Q", len(text)) + text)
            for _, _, _, offset, size in pieces:
                file.seek(start + offset)
                output.write(file.read(size))


def _pieces(name: str, info: dict[str, Any], counts: dict[str, int]) -> Iterator[tuple[str, str, list[int], int, int]]:
    """(name, dtype, shape, offset in the source, bytes) of each tensor that this one becomes."""
    begin, end = info["data_offsets"]
    match = _STACK.fullmatch(name)
    if match is None:
        yield name, info["dtype"], info["shape"], begin, end - begin
        return
    held, *shape = info["shape"]
    size = (end - begin) // held
    for expert in range(counts[match["before"]]):
        new_name = f"{match['before']}{expert}.{_NAMES[match['name']]}.{match['after']}"
        yield new_name, info["dtype"], shape, begin + (expert if held > 1 else 0) * size, size


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length
    except (struct.error, ValueError) as error:
        raise ConfigError(f"{path} is not a safetensors file ({error}). Save the checkpoint again.") from error
