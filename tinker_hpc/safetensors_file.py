"""Reading and writing safetensors in pieces, with numpy alone: files of any size on a login node, bfloat16 included.

Format (github.com/huggingface/safetensors): u64 length of the header, the header as JSON {name: {dtype, shape,
data_offsets}}, then the tensors' bytes, row by row.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinker_hpc.errors import WeightsError

FLOATS: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""Numbers that can be computed with, and their bytes."""
BLOCK_BYTES = 64 << 20
"""Read, changed and written at a time."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in the header; `begin` and `end` count from the first tensor's first byte."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Of one row of the first dimension."""
        return (self.end - self.begin) // self.shape[0] if self.shape and self.shape[0] else 0


class TensorFile:
    """An open safetensors file; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises: WeightsError if the file cannot be read as safetensors."""
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error.strerror}. Download or save it again.") from error
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            header = json.loads(self._file.read(length))
        except (struct.error, ValueError) as error:
            self._file.close()
            raise WeightsError(f"cannot read {path} as safetensors: {error}. Download or save it again.") from error
        self._start = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor as float32, or these rows of its first dimension; only they are read.

        Raises: WeightsError if it does not hold floating-point numbers of a known kind.
        """
        info = self.tensors[name]
        if info.dtype not in FLOATS:
            raise WeightsError(
                f"{name} in {self.path} is stored as {info.dtype}; expected one of {', '.join(FLOATS)}. "
                "Give a model that is stored otherwise."
            )
        first, last, _ = (rows or slice(None)).indices(info.shape[0])
        return as_float32(self._rows(info, first, last), info.dtype).reshape(last - first, *info.shape[1:])

    def codes(self, name: str, rows: slice) -> np.ndarray:
        """The bytes of these rows of a tensor with one for each number, uint8; only they are read."""
        info = self.tensors[name]
        first, last, _ = rows.indices(info.shape[0])
        return np.frombuffer(self._rows(info, first, last), np.uint8).reshape(last - first, *info.shape[1:])

    def _rows(self, info: TensorInfo, first: int, last: int) -> bytes:
        return self.read_bytes(info.begin + first * info.row_bytes, info.begin + last * info.row_bytes)

    def read_bytes(self, begin: int, end: int) -> bytes:
        """Bytes of the tensors' part of the file. Raises: WeightsError if it is shorter."""
        self._file.seek(self._start + begin)
        data = self._file.read(end - begin)
        if len(data) != end - begin:
            raise WeightsError(f"{self.path} is shorter than its header says. Download or save it again.")
        return data

    def blocks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, BLOCK_BYTES at a time."""
        info = self.tensors[name]
        for begin in range(info.begin, info.end, BLOCK_BYTES):
            yield self.read_bytes(begin, min(begin + BLOCK_BYTES, info.end))


def write_tensors(
    path: Path, entries: Mapping[str, tuple[str, tuple[int, ...], Iterator[bytes]]], metadata: Mapping[str, str]
) -> None:
    """Write a file from (dtype, shape, its bytes in pieces) by name, one piece in memory at a time. Raises: OSError."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, _) in entries.items():
        end = position + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, pieces in entries.values():
            for piece in pieces:
                file.write(piece)
        assert file.tell() == 8 + len(text) + position, f"{path}: the pieces do not fit the shapes"


_OTHER_SIZES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of a tensor in a file."""
    return (FLOATS.get(dtype) or _OTHER_SIZES[dtype]) * int(np.prod(shape, dtype=np.int64))


def as_float32(data: bytes, dtype: str) -> np.ndarray:
    """Flat float32 of little-endian bytes. bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def as_bytes(values: np.ndarray, dtype: str) -> bytes:
    """float32 as little-endian bytes of `dtype`, rounded to the nearest, ties to even, as torch does."""
    if dtype != "BF16":
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()
