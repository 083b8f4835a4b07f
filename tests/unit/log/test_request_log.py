"""A request is in the log when `append` has returned, whatever happens afterwards, and at most then."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tinker_hpc.errors import DataRootError, LeaseLostError
from tinker_hpc.log import Lease, LogReader, Record, RequestLog
from tinker_hpc.log import segment as segment_module
from tinker_hpc.log.segment import list_segments

WRITER = Path(__file__).with_name("log_writer.py")


def big(num_bytes: int) -> Record:
    return Record({"op": "x"}, {"a": np.zeros(num_bytes, np.uint8)})


def test_seqs_count_from_one_and_go_on_after_reopening(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    assert log.append([Record({"n": 1}), Record({"n": 2})]) == [1, 2]
    assert log.append([]) == []
    assert RequestLog(tmp_path).append([Record({"n": 3})]) == [3]
    records = LogReader(tmp_path).poll()
    assert [(r.header["seq"], r.header["n"]) for r in records] == [(1, 1), (2, 2), (3, 3)]


def test_the_callers_header_is_left_alone(tmp_path: Path) -> None:
    record = Record({"n": 1})
    RequestLog(tmp_path).append([record])
    assert record.header == {"n": 1}


def test_concurrent_callers_share_a_sync_and_keep_their_order(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    got: dict[tuple[int, int], list[int]] = {}

    def caller(k: int) -> None:
        for n in range(10):
            got[k, n] = log.append([Record({"k": k, "n": n, "part": p}) for p in range(2)])

    threads = [threading.Thread(target=caller, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    records = {r.header["seq"]: r.header for r in LogReader(tmp_path).poll()}
    assert sorted(records) == list(range(1, 241))
    for (k, n), seqs in got.items():
        assert seqs[1] == seqs[0] + 1
        assert [(records[s]["k"], records[s]["n"], records[s]["part"]) for s in seqs] == [(k, n, 0), (k, n, 1)]
    for k in range(12):
        assert [got[k, n] for n in range(10)] == sorted(got[k, n] for n in range(10))


def test_group_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one caller syncs, all others gather into the next segment."""
    log = RequestLog(tmp_path)
    real, calls = segment_module.os.fsync, []

    def slow_fsync(descriptor: int) -> None:
        calls.append(descriptor)
        time.sleep(0.1)
        real(descriptor)

    monkeypatch.setattr(segment_module.os, "fsync", slow_fsync)
    threads = [threading.Thread(target=log.append, args=([Record({"k": k})],)) for k in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list_segments(tmp_path)) <= 3
    assert len(LogReader(tmp_path).poll()) == 20


def test_a_record_that_cannot_be_encoded_fails_alone(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    errors: list[Exception] = []

    def bad() -> None:
        try:
            log.append([Record({"x": object()})])
        except TypeError as error:
            errors.append(error)

    threads = [threading.Thread(target=bad)] + [
        threading.Thread(target=log.append, args=([Record({"k": k})],)) for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert [r.header["seq"] for r in LogReader(tmp_path).poll()] == list(range(1, 9))


def test_nothing_acknowledged_is_lost_to_sigkill(tmp_path: Path) -> None:
    """A real writer, killed again and again at random moments, merges included."""
    acknowledged: dict[int, str] = {}
    moments = random.Random(7)
    for _ in range(6):
        command = [sys.executable, str(WRITER), str(tmp_path), "3"]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        opened = int(writer.stdout.readline().split()[1])
        assert opened >= max(acknowledged, default=0)
        time.sleep(moments.uniform(0.0, 0.25))
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout.read().decode().splitlines():
            seq, name = line.split()
            assert int(seq) not in acknowledged
            acknowledged[int(seq)] = name
        writer.stdout.close()
        writer.wait()
        records = {r.header["seq"]: r for r in LogReader(tmp_path).poll()}
        assert sorted(records) == list(range(1, len(records) + 1))
        for seq, name in acknowledged.items():
            assert records[seq].header["name"] == name
            assert records[seq].arrays["payload"].tobytes().startswith(name.encode())
    assert len(acknowledged) > 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 512 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode()}; run as root: python -m pytest {__file__}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_refuses_and_recovers(small_disk: Path) -> None:
    log = RequestLog(small_disk / "log")
    assert log.append([big(1000)]) == [1]
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    with pytest.raises(DataRootError, match=r"No space left on device\. Nothing was lost; free some space"):
        log.append([big(400_000)])
    assert not list((small_disk / "log").glob(".tmp-*")), "the half-written file takes the room that is missing"
    assert log.append([big(2000)]) == [2], "what fits is still taken"
    ballast.unlink()
    assert log.append([big(300_000)]) == [3]
    records = LogReader(small_disk / "log").poll()
    assert [(r.header["seq"], r.arrays["a"].size) for r in records] == [(1, 1000), (2, 2000), (3, 300_000)]
    assert RequestLog(small_disk / "log").last == 3


def test_a_full_disk_while_merging_loses_nothing(small_disk: Path) -> None:
    log = RequestLog(small_disk / "log")
    count = 0
    while True:
        try:
            log.append([big(7000)])
        except DataRootError:
            break
        count += 1
    log.close()
    assert count >= 33, "a merge was due and found no room"
    assert [r.header["seq"] for r in LogReader(small_disk / "log").poll()] == list(range(1, count + 1))


def test_a_file_size_limit_refuses_and_recovers(tmp_path: Path) -> None:
    """The same without root: a write that stops in the middle (EFBIG, like EDQUOT)."""
    log = RequestLog(tmp_path)
    log.append([big(10)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(DataRootError, match="File too large"):
            log.append([big(200_000)])
        assert log.append([big(20)]) == [2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert log.append([big(200_000)]) == [3]
    assert [r.arrays["a"].size for r in LogReader(tmp_path).poll()] == [10, 20, 200_000]


def test_every_caller_of_a_failed_group_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RequestLog(tmp_path)

    def no_fsync(descriptor: int) -> None:
        time.sleep(0.05)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(segment_module.os, "fsync", no_fsync)
    errors: list[DataRootError] = []

    def caller() -> None:
        try:
            log.append([big(1)])
        except DataRootError as error:
            errors.append(error)

    threads = [threading.Thread(target=caller) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 5 and all(not error.attributes["visible"] for error in errors)
    assert len({id(error) for error in errors}) == 5
    monkeypatch.undo()
    assert log.append([big(1)]) == [1]
    assert len(LogReader(tmp_path).poll()) == 1


def test_a_number_that_readers_may_have_seen_is_not_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RequestLog(tmp_path)
    monkeypatch.setattr(segment_module, "fsync_folder", lambda folder: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(DataRootError) as caught:
        log.append([Record({"n": "unclear"})])
    assert caught.value.attributes["visible"]
    monkeypatch.undo()
    assert log.append([Record({"n": "next"})]) == [2]
    assert [r.header["n"] for r in LogReader(tmp_path).poll()] == ["unclear", "next"]


@pytest.mark.skipif(
    os.getuid() == 0 and shutil.which("setpriv") is None, reason="needs setpriv: apt install util-linux"
)
def test_a_folder_without_write_permission_says_so(tmp_path: Path) -> None:
    """As another user, since root may write anywhere."""
    folder = tmp_path / "log"
    RequestLog(folder).append([big(1)])
    program = (
        "import sys; from pathlib import Path; from tinker_hpc.log.segment import publish\n"
        "try: publish(Path(sys.argv[1]), 'x', [b''])\n"
        "except OSError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    if os.getuid() == 0:
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
        for parent in (tmp_path, *tmp_path.parents):
            if parent.stat().st_mode & 0o001 == 0:
                os.chmod(parent, parent.stat().st_mode | 0o001)
        os.chmod(folder, 0o755)
    else:
        os.chmod(folder, 0o500)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Permission denied" in done.stdout and str(folder) in done.stdout


def test_a_writer_that_lost_its_lease_writes_nothing(tmp_path: Path) -> None:
    mine = Lease.acquire(tmp_path / "lease", {"pid": 1, "host": "here"}, holder="gateway")
    log = RequestLog(tmp_path / "log", mine)
    log.append([Record({"n": 1})])
    Lease.acquire(tmp_path / "lease", {"pid": 2, "host": "there"}, holder="gateway")
    with pytest.raises(LeaseLostError, match=r"pid 2 on there\. This gateway stops writing requests and ends"):
        log.append([Record({"n": 2})])
    assert LogReader(tmp_path / "log").poll()[-1].header["n"] == 1
