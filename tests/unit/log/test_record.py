"""A record comes back exactly as it was written, or not at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinker_hpc.errors import CorruptLogError
from tinker_hpc.log.record import ALIGNMENT, DTYPES, Record, decode, decode_all, encode, encode_parts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5))
)
RECORDS = st.builds(
    Record,
    st.dictionaries(st.text(max_size=8), JSON, max_size=5),
    st.dictionaries(st.text(max_size=12), ARRAYS, max_size=4),
)


@settings(deadline=None)  # other work runs beside it
@given(RECORDS)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    data = encode(record)
    back = decode(data)
    assert back.header == record.header
    assert list(back.arrays) == list(record.arrays)
    for name, array in record.arrays.items():
        assert back.arrays[name].dtype == array.dtype
        assert back.arrays[name].shape == array.shape
        assert back.arrays[name].tobytes() == array.tobytes()  # NaN payloads included
    assert len(data) % ALIGNMENT == 0
    assert data == b"".join(encode_parts(record))


@settings(deadline=None)  # other work runs beside it
@given(RECORDS, st.data())
def test_any_changed_byte_is_noticed(record: Record, data: st.DataObject) -> None:
    frame = bytearray(encode(record))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptLogError):
        decode(bytes(frame))


@settings(deadline=None)  # other work runs beside it
@given(RECORDS, st.data())
def test_a_cut_is_noticed(record: Record, data: st.DataObject) -> None:
    frame = encode(record)
    with pytest.raises(CorruptLogError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


def test_arrays_are_aligned_read_only_views() -> None:
    frame = encode(Record({}, {"a": np.arange(3, dtype=np.int32), "b": np.arange(5.0)}))
    start = np.frombuffer(frame, np.uint8).__array_interface__["data"][0]
    for array in decode(frame).arrays.values():
        address = array.__array_interface__["data"][0]
        assert start <= address < start + len(frame), "a copy, not a view"
        assert (address - start) % ALIGNMENT == 0
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_views_of_a_writable_buffer_are_read_only_too() -> None:
    array = decode(bytearray(encode(Record({}, {"a": np.zeros(3, np.float32)})))).arrays["a"]
    assert not array.flags.writeable


def test_floats_that_are_not_finite_survive() -> None:
    header = decode(encode(Record({"loss": math.nan, "norm": math.inf}))).header
    assert math.isnan(header["loss"]) and header["norm"] == math.inf


def test_big_endian_and_strided_arrays_are_written_plainly() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4)[:, ::2]
    back = decode(encode(Record({}, {"a": array}))).arrays["a"]
    assert back.tolist() == array.tolist() and back.dtype == np.int32


def test_what_json_or_a_record_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        encode(Record({"x": object()}))
    with pytest.raises(TypeError, match="float16"):
        encode(Record({}, {"x": np.zeros(2, np.float16)}))


def test_numpy_scalars_in_a_header_become_numbers() -> None:
    assert decode(encode(Record({"n": np.int64(3), "x": np.float32(0.5)}))).header == {"n": 3, "x": 0.5}


def test_the_error_names_file_and_offset() -> None:
    first, second = encode(Record({"n": 1})), bytearray(encode(Record({"n": 2})))
    second[40] ^= 1
    with pytest.raises(CorruptLogError, match=rf"seg-x is corrupt at byte {len(first)}: checksum") as caught:
        list(decode_all(first + bytes(second), where="seg-x"))
    assert caught.value.attributes["offset"] == len(first)


def test_a_newer_format_is_named() -> None:
    frame = bytearray(encode(Record({})))
    frame[8] = 2
    with pytest.raises(CorruptLogError, match="format version 2"):
        decode(bytes(frame))
