"""Files of records: found by name, complete or not there, never overwritten, merged without a gap."""

from __future__ import annotations

import itertools
import os
import threading
from bisect import bisect_left
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_hpc.errors import CorruptLogError, LeaseLostError
from tinker_hpc.log import LogReader, Record
from tinker_hpc.log import appender as appender_module
from tinker_hpc.log import segment as segment_module
from tinker_hpc.log.appender import FANOUT, MERGE_BYTES, Appender, choose_merge, merge
from tinker_hpc.log.looking import MOST_NAMES, names_told
from tinker_hpc.log.record import encode_parts
from tinker_hpc.log.segment import (
    Segment,
    chain,
    last_contiguous,
    list_segments,
    outermost,
    publish,
    read_segment,
    segments_of,
)

SEGMENTS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 8)).map(lambda t: Segment(t[0], t[0] + t[1])), max_size=12
)


def parts(*numbers: int) -> list[list[bytes]]:
    return [encode_parts(Record({"n": n})) for n in numbers]  # type: ignore[list-item]


def numbers(records: list[Record]) -> list[int]:
    return [record.header["n"] for record in records]


def numbers_in(segment: Segment) -> range:
    return range(segment.first, segment.last + 1)


def write(folder: Path, *runs: range) -> Appender:
    appender = Appender(folder)
    for run in runs:
        appender.append(parts(*run))
    return appender


@given(SEGMENTS, st.integers(0, 30))
def test_a_chain_reaches_the_first_gap_and_no_further(segments: list[Segment], after: int) -> None:
    covered = {n for s in segments for n in range(s.first, s.last + 1)}
    reach = after
    while reach + 1 in covered:
        reach += 1
    chosen = chain(segments, after)
    assert (chosen[-1].last if chosen else after) == reach
    position = after
    for segment in chosen:  # every piece continues where the last one ended
        assert segment.first <= position + 1 <= segment.last
        position = segment.last


@given(SEGMENTS, st.integers(0, 30))
def test_what_is_known_need_not_be_looked_at(segments: list[Segment], after: int) -> None:
    names = [segment.name for segment in segments]
    assert segments_of(names, after) == sorted({segment for segment in segments if segment.last > after})
    outer = outermost(segments)
    lasts = [segment.last for segment in outer]
    assert lasts == sorted(set(lasts)) and {n for s in outer for n in numbers_in(s)} == {
        n for s in segments for n in numbers_in(s)
    }
    for number in {n for s in segments for n in numbers_in(s)}:
        assert number in numbers_in(outer[bisect_left(lasts, number)])


def test_numbers_beyond_twelve_digits_are_found() -> None:
    beyond = [Segment(10**12 - 1, 10**12), Segment(10**12 + 1, 10**12 + 1)]
    names = [segment.name for segment in [Segment(5, 5), *beyond]]
    for after, expected in ((5, beyond), (10**12, beyond[1:]), (10**12 + 1, [])):
        assert segments_of(names, after) == expected


def test_a_look_at_a_long_log_costs_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the listing itself, and a comparison of texts for each name."""
    appender = write(tmp_path, *(range(n, n + 1) for n in range(1, 11)))
    reader = LogReader(tmp_path)
    assert len(reader.poll()) == 10
    made: list[Segment] = []

    def counted(first: int, last: int) -> Segment:
        made.append(Segment(first, last))
        return made[-1]

    appender.append(parts(11))
    monkeypatch.setattr(segment_module, "Segment", counted)
    assert numbers(reader.poll()) == [11] and Segment(11, 11) in made
    assert set(made) <= {Segment(0, 0), Segment(11, 11)}


@pytest.mark.usefixtures("no_fsync")
def test_an_append_to_a_long_log_seldom_looks_through_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records too big to be merged, so that there are many files."""
    looks: list[int] = []
    monkeypatch.setattr(appender_module, "MERGE_BYTES", 1)
    monkeypatch.setattr(appender_module, "choose_merge", lambda sizes: looks.append(len(sizes)) or choose_merge(sizes))
    write(tmp_path, *(range(n, n + 1) for n in range(1, 321)))
    assert looks == [1 + FANOUT * n for n in range(10)]
    assert names_told(tmp_path) == [Segment(n, n).name for n in range(321 - MOST_NAMES, 321)], "the latest, in order"


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, MERGE_BYTES)), max_size=120))
def test_merges_join_neighbours_of_one_class_within_the_limit(lengths: list[tuple[int, int]]) -> None:
    sizes, first = {}, 1
    for count, size in lengths:
        sizes[Segment(first, first + count - 1)] = size
        first += count
    chosen = choose_merge(sizes)
    if chosen:
        assert len(chosen) == FANOUT
        assert all(b.first == a.last + 1 for a, b in itertools.pairwise(chosen))
        assert sum(sizes[s] for s in chosen) <= MERGE_BYTES
        assert len({len(s) >= FANOUT for s in chosen}) == 1


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of appends; what is tested does not depend on the power staying on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("no_fsync")
def test_files_stay_few(tmp_path: Path) -> None:
    appender = write(tmp_path, *(range(n, n + 1) for n in range(1, 1101)))
    appender.close()
    appender.append(parts(1101))  # what arrived just as the last merge ended
    appender.close()
    assert len(list_segments(tmp_path)) <= 3 * FANOUT
    assert numbers(LogReader(tmp_path).poll()) == list(range(1, 1102))


@pytest.mark.usefixtures("no_fsync")
def test_a_reader_in_the_middle_of_merges_misses_and_repeats_nothing(tmp_path: Path) -> None:
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        reader = LogReader(tmp_path)
        while not done.is_set() or (new := reader.poll()):
            new = reader.poll()
            seen.extend(numbers(new))

    thread = threading.Thread(target=read)
    thread.start()
    write(tmp_path, *(range(n, n + 1) for n in range(1, 401))).close()
    done.set()
    thread.join()
    reader = LogReader(tmp_path, after=len(seen))
    assert seen + numbers(reader.poll()) == list(range(1, 401))


def test_overlap_of_merged_and_small_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 2), range(2, 4), range(4, 5))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # killed before it could
    merge(tmp_path, [Segment(1, 1), Segment(2, 3)])
    monkeypatch.undo()
    assert Segment(1, 3) in list_segments(tmp_path) and Segment(1, 1) in list_segments(tmp_path)
    assert numbers(LogReader(tmp_path).poll()) == [1, 2, 3, 4]
    assert numbers(LogReader(tmp_path, after=1).poll()) == [2, 3, 4]
    Appender(tmp_path)  # tidies up
    assert list_segments(tmp_path) == [Segment(1, 3), Segment(4, 4)]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_file_that_vanishes_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 2), range(2, 3))
    stale = list_segments(tmp_path)
    merge(tmp_path, stale)
    listings = iter([stale])
    real = list_segments
    module = "tinker_hpc.log.request_log.list_segments"
    monkeypatch.setattr(module, lambda folder, after: next(listings, None) or real(folder, after))
    assert numbers(LogReader(tmp_path).poll()) == [1, 2]


def test_a_gap_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), range(2, 3), range(3, 4))
    hidden = tmp_path / Segment(2, 2).name
    os.rename(hidden, tmp_path / "away")
    reader = LogReader(tmp_path)
    assert numbers(reader.poll()) == [1]
    assert reader.poll() == []
    os.rename(tmp_path / "away", hidden)
    assert numbers(reader.poll()) == [2, 3]


def test_a_writer_refuses_a_log_with_a_hole(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), range(2, 3), range(3, 4))
    (tmp_path / Segment(2, 2).name).unlink()
    with pytest.raises(CorruptLogError, match="record 2 is missing although later ones are there"):
        Appender(tmp_path)


def test_temporary_and_foreign_files_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    for name in (
        ".tmp-1-ab",
        "seg-000000000003-000000000003.bak",
        "seg-3",
        ".nfs0001",
        "xseg-000000000003-000000000003",
    ):
        (tmp_path / name).write_bytes(b"half")
    assert numbers(LogReader(tmp_path).poll()) == [1, 2]
    assert Appender(tmp_path).last == 2
    assert not (tmp_path / ".tmp-1-ab").exists()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_damage_to_a_published_segment_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("log")
    write(folder, range(1, 4))
    path = folder / Segment(1, 3).name
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with pytest.raises(CorruptLogError, match=r"seg-000000000001-000000000003 is corrupt at byte \d+"):
        LogReader(folder, retry_s=0).poll()


def test_damage_is_reported_at_the_record_it_hit(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / Segment(1, 3).name
    content = bytearray(path.read_bytes())
    second = sum(map(len, encode_parts(Record({"n": 1}))))
    content[second + 33] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(CorruptLogError) as caught:
        LogReader(tmp_path, retry_s=0).poll()
    assert caught.value.attributes == {"path": str(path), "offset": second}


def test_a_lagging_filesystem_gets_time(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    path = tmp_path / Segment(1, 2).name
    content = path.read_bytes()
    path.write_bytes(content[:100])
    timer = threading.Timer(0.25, path.write_bytes, [content])
    timer.start()
    assert numbers(LogReader(tmp_path, retry_s=5).poll()) == [1, 2]
    timer.join()


def test_a_damaged_newest_segment_stops_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 2))
    path = tmp_path / Segment(1, 1).name
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(appender_module, "read_segment", lambda f, s: read_segment(f, s, retry_s=0))
    with pytest.raises(CorruptLogError, match="is corrupt at byte"):
        Appender(tmp_path)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    publish(tmp_path, "x", [b"first"])
    with pytest.raises(FileExistsError):
        publish(tmp_path, "x", [b"second"])
    assert (tmp_path / "x").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["x"]


def test_two_writers_cannot_overwrite_each_other(tmp_path: Path) -> None:
    first, second = Appender(tmp_path), Appender(tmp_path)
    first.append(parts(1))
    with pytest.raises(LeaseLostError, match="only writer"):
        second.append(parts(99))
    assert numbers(LogReader(tmp_path).poll()) == [1]


def test_reading_until_a_number_and_in_pieces(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), range(6, 9))
    assert numbers(LogReader(tmp_path).poll(until=3)) == [1, 2, 3]
    reader = LogReader(tmp_path)
    assert numbers(reader.poll(1)) == [1, 2, 3, 4, 5]  # a segment is read whole
    assert numbers(reader.poll(1)) == [6, 7, 8]
    assert last_contiguous(list_segments(tmp_path)) == 8


def test_a_folder_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert LogReader(tmp_path / "later").poll() == []


def test_files_are_private(tmp_path: Path) -> None:
    write(tmp_path / "log", range(1, 2))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "log" / Segment(1, 1).name).stat().st_mode & 0o777 == 0o600
