"""One record as bytes: a JSON header and named numpy arrays, everything under a checksum. Pure.

Frame, little endian, every length a multiple of 64 so that arrays stay aligned in a file of many frames:

    0   8  magic "TKHPCREC"
    8   2  format version, 1
    10  2  zero
    12  4  crc32 of everything that follows in the frame
    16  8  length of the frame
    24  8  length of the JSON
    32     JSON {"header": ..., "arrays": [[name, dtype, shape, offset in the frame], ...]}, then padding
    ...    arrays, each at a multiple of 64

JSON is the standard library's, not orjson: a loss may be NaN, which orjson writes as null without a word.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinker_hpc.errors import CorruptLogError

MAGIC = b"TKHPCREC"
VERSION = 1
ALIGNMENT = 64
DTYPES = frozenset({"int16", "int32", "int64", "float32", "float64", "uint8", "bool"})
_HEAD = struct.Struct("<8sHHIQQ")
_CRC_STARTS = 16

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Record:
    """A request, a result or one of the worker's own notes (the table in ARCHITECTURE.md)."""

    header: dict[str, Any]
    """JSON values only; non-finite floats are kept."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name; dtypes of `DTYPES`. Read-only views after `decode`."""


def encode(record: Record) -> bytes:
    """The frame of `record`. Raises: TypeError for a header value JSON has no word for, or another dtype."""
    return b"".join(encode_parts(record))


def encode_parts(record: Record) -> list[Buffer]:
    """The same as `encode`, in pieces, the arrays not copied: for writing straight to a file."""
    arrays = {name: np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")) for name, a in record.arrays.items()}
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(f"array {name!r} has dtype {array.dtype}; a record holds {', '.join(sorted(DTYPES))}")
    text, offsets = _json_with_offsets(record.header, arrays)
    parts: list[Buffer] = [text]
    position = _HEAD.size + len(text)
    for array, offset in zip(arrays.values(), offsets, strict=True):
        parts.append(bytes(offset - position))
        parts.append(array.reshape(-1).view(np.uint8).data)
        position = offset + array.nbytes
    length = _aligned(position)
    parts.append(bytes(length - position))
    lengths = struct.pack("<QQ", length, len(text))
    checksum = zlib.crc32(lengths)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return [_HEAD.pack(MAGIC, VERSION, 0, checksum, length, len(text)), *parts]


def decode(data: Buffer) -> Record:
    """The record whose frame is exactly `data`; arrays are read-only views of it, not copies.

    Raises: CorruptLogError if a byte is missing, added or changed.
    """
    record, end = decode_at(memoryview(data), 0, where="a record")
    if end != len(data):
        raise CorruptLogError(f"a record of {end} bytes is followed by {len(data) - end} bytes that belong to nothing")
    return record


def decode_all(data: Buffer, *, where: str, end: int | None = None) -> Iterator[Record]:
    """Every record of `data[:end]`, frames lying one behind the other. `where` names the file in errors."""
    view = memoryview(data)[:end]
    offset = 0
    while offset < len(view):
        record, offset = decode_at(view, offset, where=where)
        yield record


def decode_at(view: memoryview, offset: int, *, where: str) -> tuple[Record, int]:
    """The record at `offset` and the offset behind it. Raises: CorruptLogError naming `where` and the offset."""

    def corrupt(what: str) -> CorruptLogError:
        return CorruptLogError(f"{where} is corrupt at byte {offset}: {what}", path=where, offset=offset)

    if len(view) - offset < _HEAD.size:
        raise corrupt(f"{len(view) - offset} bytes left, a record's head needs {_HEAD.size}; the file was cut short")
    magic, version, zero, checksum, length, text_length = _HEAD.unpack_from(view, offset)
    if magic != MAGIC or zero != 0:
        raise corrupt(f"expected the magic {MAGIC!r}, found {bytes(magic)!r}")
    if version != VERSION:
        raise corrupt(f"format version {version}, this program reads {VERSION}; use the tinker_hpc that wrote it")
    if length > len(view) - offset or length < _HEAD.size + text_length or length % ALIGNMENT:
        raise corrupt(f"the record says {length} bytes, {len(view) - offset} are there; the file was cut short")
    frame = view[offset : offset + length]
    found = zlib.crc32(frame[_CRC_STARTS:])
    if found != checksum:
        raise corrupt(f"checksum {found:08x}, the record says {checksum:08x}")
    content = json.loads(bytes(frame[_HEAD.size : _HEAD.size + text_length]))
    arrays = {}
    for name, dtype, shape, start in content["arrays"]:
        count = math.prod(shape)
        array = np.frombuffer(frame, dtype=dtype, count=count, offset=start) if count else np.empty(0, dtype)
        array = array.reshape(shape)
        array.flags.writeable = False
        arrays[name] = array
    return Record(content["header"], arrays), offset + length


def _json_with_offsets(header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[bytes, list[int]]:
    """The JSON text and where each array starts. The offsets are part of the text: widen until they fit."""
    room = 0
    while True:
        offsets, position = [], room
        for array in arrays.values():
            position = _aligned(position)
            offsets.append(position)
            position += array.nbytes
        entries = [
            [name, array.dtype.name, list(array.shape), offset]
            for (name, array), offset in zip(arrays.items(), offsets, strict=True)
        ]
        text = json.dumps({"header": header, "arrays": entries}, separators=(",", ":"), default=_scalar).encode()
        if not arrays or _HEAD.size + len(text) <= room:
            return text, offsets
        room = _aligned(_HEAD.size + len(text) + 8 * len(arrays))


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a record's header cannot hold {value!r} of type {type(value).__name__}; use JSON values")


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
