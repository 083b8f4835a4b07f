"""What is told in place reaches a reader whose listings are old; what is told wrongly hides nothing.

An old listing is made by hand here; tests/contract/test_filesystems.py has a filesystem that really gives them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinker_hpc.errors import CorruptLogError, DataRootError, LeaseLostError
from tinker_hpc.log import Lease, LogReader, Record, RequestLog, ResultLog, ResultReader, looking
from tinker_hpc.log.appender import Appender
from tinker_hpc.log.record import encode_parts


@pytest.fixture
def old_listings(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """By folder: what every listing from now on says, whatever is there."""
    old: dict[str, list[str]] = {}
    real = os.listdir
    monkeypatch.setattr(looking.os, "listdir", lambda folder: old.get(str(folder)) or real(folder))
    return old


def seqs(records: list[Record]) -> list[int]:
    return [record.header["seq"] for record in records]


def test_the_highest_number_told_counts_in_any_order(tmp_path: Path) -> None:
    assert looking.newest_told(tmp_path) == 0
    for number, newest in ((2, 2), (1, 2), (5, 5), (4, 5)):
        looking.tell_newest(tmp_path, number)
        assert looking.newest_told(tmp_path) == newest


def test_names_that_are_half_written_are_not_believed(tmp_path: Path) -> None:
    assert looking.names_told(tmp_path) == []
    looking.tell_names(tmp_path, [f"name-{i}" for i in range(9)])
    looking.tell_names(tmp_path, ["a", "b"])  # shorter: the rest of the longer one stays behind it
    assert looking.names_told(tmp_path) == ["a", "b"]
    whole = (tmp_path / looking.CONTENTS).read_bytes()
    for cut in range(len("0000000c 00000000\na\nb")):
        (tmp_path / looking.CONTENTS).write_bytes(whole[:cut])
        assert looking.names_told(tmp_path) == []


def test_a_reader_with_an_old_listing_reads_what_was_told(tmp_path: Path, old_listings: dict[str, list[str]]) -> None:
    log, reader = RequestLog(tmp_path), LogReader(tmp_path)
    log.append([Record({})])
    old_listings[str(tmp_path)] = os.listdir(tmp_path)
    assert seqs(reader.poll()) == [1]
    log.append([Record({}), Record({})])
    log.append([Record({})])
    assert seqs(reader.poll()) == [2, 3, 4]


def test_who_opens_a_log_with_an_old_listing_goes_on_behind_its_end(
    tmp_path: Path, old_listings: dict[str, list[str]]
) -> None:
    log = RequestLog(tmp_path)
    log.append([Record({})])
    before = os.listdir(tmp_path)
    log.append([Record({}), Record({})])
    old_listings[str(tmp_path)] = before
    assert RequestLog(tmp_path).append([Record({})]) == [4]
    del old_listings[str(tmp_path)]
    assert seqs(LogReader(tmp_path).poll()) == [1, 2, 3, 4]


def test_a_loser_with_an_old_listing_stops_and_a_reader_with_one_does_not_take_its_records(
    tmp_path: Path, old_listings: dict[str, list[str]]
) -> None:
    loser = ResultLog(tmp_path, Lease.acquire(tmp_path / "lease", {}))
    loser.publish([Record({"name": "a"})])
    reader = ResultReader(tmp_path)
    for folder in ("lease", "results"):
        old_listings[str(tmp_path / folder)] = os.listdir(tmp_path / folder)
    winner = ResultLog(tmp_path, Lease.acquire(tmp_path / "lease", {}))
    assert winner.lease.fence == 2
    with pytest.raises(LeaseLostError, match="lease 2 belongs to"):
        loser.publish([Record({"name": "late"})])
    past_its_check = Appender(tmp_path / "results" / "00000001")
    past_its_check.append([encode_parts(Record({"name": "zombie", "fence": 1, "number": past_its_check.last + 1}))])
    winner.publish([Record({"name": "b"})])
    assert [record.header["name"] for record in reader.poll() if "name" in record.header] == ["a", "b"]


@pytest.mark.parametrize("purged", ["first", "told"])
def test_what_a_purge_took_is_missed_with_words_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purged: str
) -> None:
    log = RequestLog(tmp_path)
    for _ in range(3):
        log.append([Record({})])
    segments = sorted(tmp_path.glob("seg-*"))
    segments[0 if purged == "first" else -1].unlink()
    reader = LogReader(tmp_path)
    assert seqs(reader.poll()) == ([] if purged == "first" else [1, 2])
    assert reader.poll() == [] == reader.poll(), "a filesystem may show it late"
    monkeypatch.setattr(looking, "LAG_S", -1.0)
    with pytest.raises(CorruptLogError, match=r"record [13] is missing although .* Did a purge of old files remove it"):
        reader.poll()
    if purged == "first":
        with pytest.raises(CorruptLogError, match="Nothing was changed"):
            RequestLog(tmp_path)


def test_an_error_does_not_cost_what_was_read_before_it(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    for _ in range(3):
        log.append([Record({})])
    last = max(tmp_path.glob("seg-*"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    reader = LogReader(tmp_path, retry_s=0)
    assert seqs(reader.poll()) == [1, 2]
    with pytest.raises(CorruptLogError):
        reader.poll()
    last.write_bytes(whole)
    assert seqs(reader.poll()) == [3]


def test_a_folder_that_cannot_be_listed_is_said_to_be_the_disks_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> list[str]:
        raise OSError(5, "Input/output error")

    lease = Lease.acquire(tmp_path / "lease", {})
    monkeypatch.setattr(looking.os, "listdir", refuse)
    for look in (lease.check, LogReader(tmp_path).poll, ResultReader(tmp_path).poll):
        with pytest.raises(DataRootError, match="Input/output error"):
            look()
