"""Only the worker with the highest fencing number writes results that count."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tinker_hpc.errors import CorruptLogError, LeaseLostError
from tinker_hpc.log import Lease, Record, ResultFinder, ResultLog, ResultReader
from tinker_hpc.log.appender import Appender, merge
from tinker_hpc.log.record import encode_parts
from tinker_hpc.log.result_log import _fence_folder
from tinker_hpc.log.segment import Segment, list_segments


def take_over(folder: Path) -> ResultLog:
    return ResultLog(folder, Lease.acquire(folder / "lease", {"host": "node", "pid": 7}))


def names(records: list[Record]) -> list[str]:
    return [record.header["name"] for record in records if "name" in record.header]


def zombie_write(folder: Path, fence: int, name: str) -> None:
    """What a worker writes that has checked its lease just before it lost it."""
    appender = Appender(_fence_folder(folder / "results", fence))
    appender.append([encode_parts(Record({"name": name, "fence": fence, "number": appender.last + 1}))])


def test_results_come_in_order_with_their_fence(tmp_path: Path) -> None:
    log, reader = take_over(tmp_path), ResultReader(tmp_path)
    assert [r.header["op"] for r in reader.poll()] == ["sealed"]
    log.publish([Record({"name": "a"}), Record({"name": "b"})])
    log.publish([])
    log.publish([Record({"name": "c"})])
    records = reader.poll()
    assert names(records) == ["a", "b", "c"] and {r.header["fence"] for r in records} == {1}
    assert reader.poll() == []


def test_a_reader_may_start_before_the_worker(tmp_path: Path) -> None:
    reader = ResultReader(tmp_path)
    assert reader.poll() == []
    take_over(tmp_path).publish([Record({"name": "a"})])
    assert names(reader.poll()) == ["a"]


def test_the_old_worker_stops(tmp_path: Path) -> None:
    old = take_over(tmp_path)
    take_over(tmp_path)
    with pytest.raises(LeaseLostError, match="lease 2 belongs to pid 7 on node"):
        old.publish([Record({"name": "late"})])
    assert names(ResultReader(tmp_path).poll()) == []


def test_what_a_zombie_writes_after_the_seal_does_not_count(tmp_path: Path) -> None:
    take_over(tmp_path).publish([Record({"name": "a"})])
    early_reader = ResultReader(tmp_path)
    new = take_over(tmp_path)
    zombie_write(tmp_path, 1, "zombie")
    new.publish([Record({"name": "b"})])
    assert names(early_reader.poll()) == ["a", "b"]
    assert names(ResultReader(tmp_path).poll()) == ["a", "b"]


def test_results_are_held_back_while_a_takeover_is_under_way(tmp_path: Path) -> None:
    old = take_over(tmp_path)
    old.publish([Record({"name": "a"})])
    reader = ResultReader(tmp_path)
    assert names(reader.poll()) == ["a"] and not reader.at_end
    assert reader.poll() == [] and reader.at_end
    old.publish([Record({"name": "b"})])
    _fence_folder(tmp_path / "results", 2).mkdir()  # the new worker got this far
    assert reader.poll() == [] and not reader.at_end
    Lease.acquire(tmp_path / "lease", {})
    ResultLog(tmp_path, Lease(tmp_path / "lease", 2))
    assert names(reader.poll()) == ["b"]
    assert reader.poll() == [] and reader.at_end


def test_a_takeover_between_the_readers_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new worker counts the old one's records after the reader has read one that came too late to be counted."""
    take_over(tmp_path).publish([Record({"name": "a"})])
    reader = ResultReader(tmp_path)
    reader.poll()
    module = "tinker_hpc.log.result_log._list_fences"
    from tinker_hpc.log.result_log import _list_fences as real

    new: list[ResultLog] = []

    def listing(results: Path) -> list[int]:
        found = real(results)
        if not new:  # between the first listing and the read
            monkeypatch.undo()
            new.append(take_over(tmp_path))
            zombie_write(tmp_path, 1, "zombie")
        return found

    monkeypatch.setattr(module, listing)
    assert names(reader.poll()) == []
    new[0].publish([Record({"name": "b"})])
    assert names(reader.poll()) == ["b"]


def test_a_worker_that_died_before_sealing_changes_nothing(tmp_path: Path) -> None:
    take_over(tmp_path).publish([Record({"name": "a"})])
    Lease.acquire(tmp_path / "lease", {})
    _fence_folder(tmp_path / "results", 2).mkdir()
    third = take_over(tmp_path)
    assert third.lease.fence == 3
    zombie_write(tmp_path, 2, "late seal")
    third.publish([Record({"name": "c"})])
    assert names(ResultReader(tmp_path).poll()) == ["a", "c"]


def test_a_seal_is_kept_by_the_workers_after_it(tmp_path: Path) -> None:
    take_over(tmp_path).publish([Record({"name": "a"})])
    take_over(tmp_path).publish([Record({"name": "b"})])
    zombie_write(tmp_path, 1, "zombie")
    take_over(tmp_path).publish([Record({"name": "c"})])
    assert names(ResultReader(tmp_path).poll()) == ["a", "b", "c"]


def test_two_workers_racing_get_different_fences(tmp_path: Path) -> None:
    fences: list[int] = []

    def acquire() -> None:
        fences.append(Lease.acquire(tmp_path / "lease", {}).fence)

    threads = [threading.Thread(target=acquire) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fences) == list(range(1, 13))


def test_a_held_lease_is_quiet_and_a_used_one_is_refused(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path / "lease", {"pid": 1})
    lease.check()
    ResultLog(tmp_path, lease)
    with pytest.raises(LeaseLostError, match="was used before"):
        ResultLog(tmp_path, lease)


def test_a_long_log_is_read_in_pieces(tmp_path: Path) -> None:
    import numpy as np

    for fence in range(2):
        log = take_over(tmp_path)
        for n in range(3):
            log.publish([Record({"name": f"{fence}{n}"}, {"x": np.zeros(1000, np.uint8)})])
    reader, found = ResultReader(tmp_path), []
    while new := reader.poll(max_bytes=900):
        assert len(names(new)) <= 1
        found += names(new)
    assert found == ["00", "01", "02", "10", "11", "12"]


@pytest.mark.parametrize("header", [{"fence": 2, "number": 3}, {"fence": 1, "number": 9}, {"number": 3}])
def test_a_record_of_another_writer_is_not_believed(tmp_path: Path, header: dict[str, int]) -> None:
    """It sits in the log as if it were the next one, well-formed; what it says of itself gives it away."""
    log = take_over(tmp_path)
    log.publish([Record({"name": "a"})])
    reader = ResultReader(tmp_path)
    assert names(reader.poll()) == ["a"]
    Appender(_fence_folder(tmp_path / "results", 1)).append([encode_parts(Record({"name": "forged", **header}))])
    with pytest.raises(CorruptLogError, match="Somebody else put it there"):
        reader.poll()
    with pytest.raises(LeaseLostError, match="only writer"):
        log.publish([Record({"name": "b"})])


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file away: sudo pytest tests/unit/log")
def test_a_file_of_another_user_is_not_believed(tmp_path: Path) -> None:
    take_over(tmp_path).publish([Record({"name": "a"})])
    newest = max((tmp_path / "results").rglob("seg-*"))
    os.chown(newest, 12345, -1)
    reader = ResultReader(tmp_path)
    assert [record.header["op"] for record in reader.poll()] == ["sealed"]
    with pytest.raises(CorruptLogError, match="belongs to uid 12345, the log to uid 0"):
        reader.poll()


def test_single_results_are_found_again(tmp_path: Path) -> None:
    first = take_over(tmp_path)
    for n in range(40):  # some of them merged
        first.publish([Record({"name": f"a{n}"})])
    first.close()
    second = take_over(tmp_path)
    second.publish([Record({"name": "b0"}), Record({"name": "b1"})])
    found = [record.header for record in ResultReader(tmp_path).poll()]
    places = {header["name"]: (header["fence"], header["number"]) for header in found if "name" in header}
    finder = ResultFinder(tmp_path)
    for name in ("b1", "a0", "a39", "b0", "a7"):
        record = finder.find(*places[name])
        assert record is not None and record.header["name"] == name
    assert finder.find(1, 99) is None and finder.find(7, 1) is None


def test_a_folder_is_listed_again_only_for_what_is_not_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def counted(folder: Path, after: int = 0) -> list[Segment]:
        looks.append(after)
        return list_segments(folder, after)

    monkeypatch.setattr("tinker_hpc.log.result_log.list_segments", counted)
    log, finder = take_over(tmp_path), ResultFinder(tmp_path)
    folder = _fence_folder(tmp_path / "results", 1)

    def found(*numbers: int) -> list[str]:
        return names([record for number in numbers if (record := finder.find(1, number)) is not None])

    for n in range(2, 12):
        log.publish([Record({"name": f"r{n}"})])
    assert found(5, 9, 6, 11) == ["r5", "r9", "r6", "r11"] and looks == [4]
    assert found(3, 4) == ["r3", "r4"] and looks == [4, 2], "not looked at before"
    merge(folder, [Segment(n, n) for n in range(3, 9)])
    assert found(9) == ["r9"] and found(7, 4, 8) == ["r7", "r4", "r8"] and looks == [4, 2, 6]
    assert found(3, 11, 5) == ["r3", "r11", "r5"] and looks == [4, 2, 6, 4], "5 is gone too"
    log.publish([Record({"name": "r12"})])
    (folder / Segment(10, 10).name).rename(folder / "hidden")  # a filesystem that does not show it yet
    assert found(12, 10) == ["r12"] and looks == [4, 2, 6, 4, 11, 9]
    (folder / "hidden").rename(folder / Segment(10, 10).name)
    assert found(10, 12) == ["r10", "r12"] and looks == [4, 2, 6, 4, 11, 9], "told, so it is where it was said to be"
