"""The folders on disk: private, replaced whole, and refused with the command that would repair them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tinker_hpc.errors import DataRootError, UnknownRunError
from tinker_hpc.private_files import check_data_root, read_json, write_bytes, write_json
from tinker_hpc.run_folder import RunFolder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_is_the_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        folder = RunFolder.new(tmp_path / "root", "r")
        write_json(folder.spec, {})
        folder.worker(0).create(base_model="m", base_model_folder="/m")
    finally:
        os.umask(old)
    for path in [tmp_path / "root", *(tmp_path / "root").rglob("*")]:
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_a_data_root_that_is_not_private_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o755)
    with pytest.raises(DataRootError, match=f"mode 0755: others.*chmod 700 {root}"):
        check_data_root(root)
    root.chmod(0o700)
    assert check_data_root(root) == root


def test_a_file_is_not_a_data_root(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(DataRootError, match="is not a folder"):
        check_data_root(tmp_path / "root")
    with pytest.raises(DataRootError, match=r"cannot create .*data_root in the configuration"):
        check_data_root(tmp_path / "root" / "below")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away: sudo make unit")
def test_somebody_elses_data_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(DataRootError, match="belongs to uid 12345, not to you"):
        check_data_root(root)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(DataRootError, match=r"No space left on device.*Free some space"):
        write_json(path, {"n": 2})
    assert read_json(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_ids_that_are_not_runs(tmp_path: Path) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    for run_id in ("nope", "../runs/x", folder.run_id, ""):  # the last one exists and has no run.json yet
        with pytest.raises(UnknownRunError):
            RunFolder.find(tmp_path / "root", run_id)
    write_json(folder.spec, {})
    assert RunFolder.find(tmp_path / "root", folder.run_id) == folder


def test_workers_come_in_the_order_declared(tmp_path: Path) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    for index in (10, 2, 0):
        folder.worker(index).create(base_model=f"m{index}", base_model_folder="/m")
    (folder.path / "workers" / "7").mkdir()  # not declared yet
    write_bytes(folder.path / "workers" / "notes", b"")
    assert [worker.path.name for worker in folder.workers()] == ["0", "2", "10"]
