"""Base models that are published in FP8 or MXFP4: which tensors of the files make which tensor of the model, and the
arithmetic of a part of one. Pure, with numpy alone, so that a login node can merge what a worker can load.

FP8 (DeepSeek-V3, Qwen3-...-FP8): `X.weight` in float8_e4m3fn and, for every block of rows and columns
(`weight_block_size` of config.json, the last ones cut off), a factor in `X.weight_scale_inv`. Source: weight_dequant in
inference/kernel.py of deepseek-ai/DeepSeek-V3.
MXFP4 (gpt-oss): a tensor [experts, in, out] is stored transposed, as `<name>_blocks` uint8 [experts, out, in / 32, 16],
two numbers of 4 bits (e2m1) in a byte, the first in its lower half, and `<name>_scales` uint8 [experts, out, in / 32],
exponents of 2 with a bias of 127. Sources: Open Compute Project, Microscaling Formats 1.0, section 5.3.3;
transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ConfigError, WeightsError

Shape = tuple[int, ...]
Block = tuple[int, int]

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"
_BLOCK_VALUES = 32


@dataclass(frozen=True)
class Stored:
    """How a tensor of the model lies in the files."""

    shape: Shape
    """as the model has it"""
    numbers: str
    """name of the tensor with its numbers, or their codes"""
    scales: str | None = None
    """name of the tensor with the factors of the codes; None: plain numbers"""

    @property
    def is_mxfp4(self) -> bool:
        return self.scales is not None and self.numbers.endswith(BLOCKS)


def fp8_block(config: Mapping[str, Any], where: str = "config.json") -> Block | None:
    """Rows and columns that share a factor in a model stored in FP8; None where it is not.

    Args: config: config.json. where: names it in errors.
    Raises: ConfigError for a quantisation that is not read.
    """
    quantisation = config.get("quantization_config") or {}
    method = quantisation.get("quant_method")
    if method in (None, "mxfp4"):
        return None
    if method == "fp8" and quantisation.get("fmt", "e4m3") == "e4m3":
        match quantisation.get("weight_block_size"):
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
    described = {key: quantisation[key] for key in ("quant_method", "fmt", "weight_block_size") if key in quantisation}
    raise ConfigError(
        f"{where} says that the model is stored quantised ({described}). What is read: plain numbers, mxfp4, and fp8 "
        "(e4m3) with weight_block_size. Give such a version, or make one: load it with transformers, dequantise it, "
        "and save_pretrained it into another folder."
    )


def as_the_model_has_them(found: Mapping[str, tuple[str, Shape]], block: Block | None, where: str) -> dict[str, Stored]:
    """The model's tensors, by name, of those in the files.

    Args:
        found: safetensors' dtype and the shape of every tensor in the files.
        block: what `fp8_block` says.
    Raises: WeightsError naming the factors that are missing or misshapen.
    """
    stored: dict[str, Stored] = {}
    complaints = []
    for name, (dtype, shape) in found.items():
        if name.endswith(SCALE_INV) and name.removesuffix(SCALE_INV) in found:
            continue
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in found:
            continue
        if name.endswith(BLOCKS) and dtype == "U8" and len(shape) == 4:
            scales, expected = name.removesuffix(BLOCKS) + SCALES, shape[:3]
            stored[name.removesuffix(BLOCKS)] = Stored((shape[0], shape[2] * _BLOCK_VALUES, shape[1]), name, scales)
        elif dtype == "F8_E4M3" and len(shape) == 2:
            if block is None:
                raise WeightsError(
                    f"{name} in {where} is stored as {dtype}, but config.json has no quantization_config with "
                    "weight_block_size. Take config.json from where the weights are from."
                )
            scales, expected = name + SCALE_INV, tuple(-(-size // n) for size, n in zip(shape, block, strict=True))
            stored[name] = Stored(shape, name, scales)
        else:
            stored[name] = Stored(shape, name)
            continue
        if scales not in found:
            complaints.append(f"{scales} is missing")
        elif found[scales][1] != expected:
            complaints.append(f"{scales} is {list(found[scales][1])}, expected {list(expected)}")
    if complaints:
        more = f" and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise WeightsError(
            f"the quantised tensors in {where} lack their factors: {'; '.join(complaints[:8])}{more}. "
            "Download the model again."
        )
    return stored


def fp8_values(codes_RC: np.ndarray, scales: np.ndarray, block: Block, first: tuple[int, int]) -> np.ndarray:
    """float32 [R, C] of a part of a matrix.

    Args:
        codes_RC: uint8, bits of float8_e4m3fn.
        scales: float32, the factors of the blocks that the part touches.
        first: row and column of the part's first entry, counted from the first of those blocks.
    """
    values = _E4M3[codes_RC]
    rows, columns = (
        (start + np.arange(size)) // n for start, size, n in zip(first, codes_RC.shape, block, strict=True)
    )
    for block_row, scales_C in enumerate(scales[:, columns]):
        values[slice(*np.searchsorted(rows, (block_row, block_row + 1)))] *= scales_C
    return values


def mxfp4_values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [..., G * 32] of uint8 blocks [..., G, 16] and scales [..., G]; every one is exact in bfloat16 too."""
    values = _E2M1_PAIRS[blocks].view(np.float32).reshape(*blocks.shape, 2)
    values *= np.ldexp(np.float32(1.0), scales.astype(np.int32) - 127)[..., None, None]
    return values.reshape(*blocks.shape[:-2], -1)


def touched(start: int, end: int, size: int) -> tuple[slice, int]:
    """Which blocks of `size` the range touches, and where in the first of them it begins."""
    return slice(start // size, -(-end // size)), start % size


def _e4m3() -> np.ndarray:
    """float8_e4m3fn by its definition: 4 bits of exponent (bias 7), 3 of mantissa, no infinity, NaN where all are set.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, table 1.
    """
    codes = np.arange(256)
    sign, exponent, mantissa = np.where(codes >> 7, -1.0, 1.0), codes >> 3 & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[codes & 127 == 127] = np.nan
    return (sign * values).astype(np.float32)


_E4M3 = _e4m3()
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
_E2M1_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=-1).view(np.uint64)[:, 0]
"""both numbers in a byte, as one of 64 bits: one look-up instead of two"""
