"""The bell is a hint: fast where both sides share a node, polling with growing pauses where not."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinker_hpc.log import Bell
from tinker_hpc.log.bell import LONGEST_PAUSE_S, _private_folder


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Not in tmp_path (made first, in the usual place): the path of a socket must be short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def waited(bell: Bell, timeout_s: float) -> tuple[bool, float]:
    started = time.monotonic()
    return bell.wait(timeout_s), time.monotonic() - started


def test_a_ring_wakes_the_other_side_at_once(tmp_path: Path) -> None:
    gateway, worker = Bell(tmp_path, side="gateway"), Bell(tmp_path, side="worker")
    for one, other in ((gateway, worker), (worker, gateway)):
        timer = threading.Timer(0.1, one.ring)
        timer.start()
        rang, seconds = waited(other, 10)
        assert rang and 0.05 < seconds < 5
        timer.join()
    gateway.close(), worker.close()


def test_a_ring_before_the_wait_is_not_lost_and_rings_add_up_to_one(tmp_path: Path) -> None:
    gateway, worker = Bell(tmp_path, side="gateway"), Bell(tmp_path, side="worker")
    for _ in range(1000):  # more than a socket's queue holds: never blocks
        gateway.ring()
    assert worker.wait(60)
    assert not worker.wait(0.01)
    gateway.close(), worker.close()


def test_no_busy_loop_while_the_peer_listens(tmp_path: Path) -> None:
    gateway, worker = Bell(tmp_path, side="gateway"), Bell(tmp_path, side="worker")
    before = time.process_time()
    rang, seconds = waited(worker, 0.5)
    assert not rang and seconds >= 0.5 and time.process_time() - before < 0.3
    gateway.close(), worker.close()


def test_without_a_peer_pauses_grow_and_ringing_shortens_them(tmp_path: Path) -> None:
    worker = Bell(tmp_path, side="worker")
    pauses = [waited(worker, 10)[1] for _ in range(8)]
    assert min(pauses[:3]) < 0.1 and pauses[-1] > min(pauses) and sum(pauses) < 10
    worker._pause_s = LONGEST_PAUSE_S * 4
    assert waited(worker, 0.2)[1] < 3, "never longer than asked"
    worker.ring()
    assert waited(worker, 10)[1] < 3
    worker.close()


def test_a_peer_that_was_killed_leaves_no_trap(tmp_path: Path, own_temporary_folder: Path) -> None:
    gateway, dead = Bell(tmp_path, side="gateway"), Bell(tmp_path, side="worker")
    assert dead._socket is not None
    dead._socket.close()  # as a kill does: the socket's file stays
    gateway.ring()
    assert waited(gateway, 30)[1] < 15
    worker = Bell(tmp_path, side="worker")
    gateway.ring()
    assert worker.wait(60)
    gateway.close(), worker.close()


def test_different_worker_folders_have_different_bells(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    gateway, other = Bell(tmp_path / "a", side="gateway"), Bell(tmp_path / "b", side="worker")
    gateway.ring()
    assert not other.wait(0.05)
    gateway.close(), other.close()


@pytest.mark.parametrize("trap", ["open to others", "a symlink", "a file"])
def test_a_folder_that_others_could_reach_is_not_used(tmp_path: Path, own_temporary_folder: Path, trap: str) -> None:
    path = own_temporary_folder / f"tinker_hpc-{os.getuid()}"
    if trap == "open to others":
        path.mkdir()
        os.chmod(path, 0o777)
    elif trap == "a symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("")
    assert _private_folder() is None
    bell = Bell(tmp_path, side="worker")
    bell.ring()
    rang, seconds = waited(bell, 10)
    assert not rang and seconds < 5
    bell.close()


def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, own_temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_temporary_folder / f"tinker_hpc-{os.getuid() + 1}").mkdir(mode=0o700)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert _private_folder() is None


def test_a_path_too_long_for_a_socket_means_polling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    bell = Bell(tmp_path, side="worker")
    bell.ring()
    assert waited(bell, 10)[1] < 1


def test_the_socket_folder_is_private(tmp_path: Path, own_temporary_folder: Path) -> None:
    bell = Bell(tmp_path, side="worker")
    folder = own_temporary_folder / f"tinker_hpc-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [p.name.split(".")[1] for p in folder.iterdir()] == ["worker"]
    bell.close()
    assert not list(folder.iterdir())
