"""Old requests lose their payload and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from tinker_hpc.log import LogReader, Record, RequestLog
from tinker_hpc.log.request_log import compacted_through
from tinker_hpc.log.rewinds import add_rewind, ranges, read_rewinds, taken_back
from tinker_hpc.private_files import make_private
from tinker_hpc.run_folder import WorkerFolder

PAYLOAD = 10_000


def filled(folder: Path, count: int) -> RequestLog:
    log = RequestLog(folder)
    for number in range(1, count + 1):
        log.append([Record({"op": "x", "request_id": f"r{number}"}, {"tokens": np.full(PAYLOAD, number, np.uint8)})])
    log.close()
    return log


def stripped(records: Iterable[Record]) -> list[int]:
    return [record.header["seq"] for record in records if not record.arrays]


def test_payloads_go_oldest_first_and_headers_stay(tmp_path: Path) -> None:
    log = filled(tmp_path, 100)
    assert log.compact(80, frozenset({5}), keep_bytes=10**9) == 0 and log.compacted == 0, "there is room for all"
    reader = LogReader(tmp_path)
    early = reader.poll(200_000)
    reached = log.compact(80, frozenset({5}), keep_bytes=0)
    records = LogReader(tmp_path).poll()
    assert [record.header["request_id"] for record in records] == [f"r{n}" for n in range(1, 101)]
    assert stripped(records) == [n for n in range(1, reached + 1) if n != 5] and 32 <= reached <= 80
    assert all(record.header.get("compacted") for record in records if not record.arrays)
    assert records[4].arrays["tokens"].tolist() == [5] * PAYLOAD, "a snapshot leaves this one to redo"
    later = reader.poll()
    assert [r.header["seq"] for r in [*early, *later]] == list(range(1, 101)), "a reader on the way is not disturbed"
    again = RequestLog(tmp_path)
    assert again.compacted == compacted_through(tmp_path) == reached
    assert again.append([Record({"op": "x"})]) == [101]
    again.close()


def test_as_much_as_may_stay_stays(tmp_path: Path) -> None:
    log = filled(tmp_path, 100)
    size = sum(path.stat().st_size for path in tmp_path.glob("seg-*"))
    reached = log.compact(100, frozenset(), keep_bytes=size // 2)
    left = sum(path.stat().st_size for path in tmp_path.glob("seg-*"))
    assert 0 < reached < 100 and size // 3 < left <= size // 2 + 40_000
    assert log.compact(100, frozenset(), keep_bytes=size) == reached, "nothing more to do"


def test_rewinds_are_ranges_and_add_up(tmp_path: Path) -> None:
    assert ranges([5, 3, 4, 9, 7, 8]) == [[3, 5], [7, 9]] and ranges([]) == []
    folder = WorkerFolder(make_private(tmp_path / "0"))
    assert read_rewinds(folder) == [] and taken_back([]) == frozenset()
    assert add_rewind(folder, [4, 5, 6], "because").number == 1
    assert add_rewind(folder, [9], "again").number == 2
    assert taken_back(read_rewinds(folder)) == {4, 5, 6, 9}
    assert [rewind.reason for rewind in read_rewinds(folder)] == ["because", "again"]


def test_damage_is_not_compacted_away(tmp_path: Path) -> None:
    log = filled(tmp_path, 40)
    oldest = min(tmp_path.glob("seg-*"))
    content = bytearray(oldest.read_bytes())
    content[500] ^= 1
    oldest.write_bytes(bytes(content))
    with pytest.raises(Exception, match="corrupt"):
        log.compact(40, frozenset(), keep_bytes=0)
