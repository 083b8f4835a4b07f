"""The run index is never the truth: deleted, damaged or foreign, it says what the run folders say."""

from __future__ import annotations

import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from tinker_hpc.errors import DataRootError
from tinker_hpc.private_files import write_json
from tinker_hpc.registry import Registry, RunRow, row_from_folder
from tinker_hpc.run_folder import RunFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def registry(tmp_path: Path, root: Path) -> Registry:
    return Registry(tmp_path / "state", root)


def make_run(root: Path, created_at: float, *, outcome: dict | None = None) -> RunFolder:
    folder = RunFolder.new(root, "sft")
    spec = {"kind": "run", "name": "sft", "base_model": "m", "cluster": {"name": "della"}, "created_at": created_at}
    write_json(folder.spec, spec)
    write_json(folder.submitted, {"job_id": 17, "submitted_at": created_at})
    if outcome:
        write_json(folder.outcome, outcome)
    return folder


def test_rows_are_the_folders_newest_first(registry: Registry, root: Path) -> None:
    assert registry.refresh() == []
    old = make_run(root, 1.0, outcome={"state": "failed", "error": "boom", "ended_at": 2.0})
    new = make_run(root, 5.0)
    rows = registry.refresh()
    assert [row.run_id for row in rows] == [new.run_id, old.run_id]
    assert rows[1] == RunRow(old.run_id, "run", "sft", "m", "della", "17", 1.0, 2.0, "FAILED", "boom")


def test_a_folder_without_a_spec_is_not_a_run(registry: Registry, root: Path) -> None:
    folder = RunFolder.new(root, "half")
    assert row_from_folder(folder) is None
    (root / "runs" / "stray-file").write_text("")
    assert registry.refresh() == []


def test_a_data_root_that_cannot_be_listed_is_said(registry: Registry, root: Path, monkeypatch) -> None:
    root.write_text("")
    with pytest.raises(DataRootError, match=f"cannot list {root}/runs: Not a directory.*TINKER_HPC_DATA_ROOT"):
        registry.refresh()

    def locked(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", locked)  # root, who runs the tests in CI, may list everything
    with pytest.raises(DataRootError, match=r"Permission denied.*check its permissions"):
        registry.refresh()


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
@pytest.mark.parametrize("name", ["run.json", "submitted.json", "outcome.json"])
def test_a_damaged_run_does_not_hide_the_others(registry: Registry, root: Path, name: str, content: str) -> None:
    good, bad = make_run(root, 1.0), make_run(root, 2.0)
    (bad.path / name).write_text(content)
    others = {bad.run_id} if content == "null" and name != "run.json" else set()  # as if it were not written yet
    assert {row.run_id for row in registry.refresh()} == {good.run_id} | others


@pytest.mark.parametrize("damage", ["delete", "garbage", "truncate", "other schema", "unreadable"])
def test_a_damaged_index_is_rebuilt_silently(registry: Registry, root: Path, damage: str, recwarn) -> None:
    folders = [make_run(root, float(i)) for i in range(3)]
    expected = registry.refresh()
    assert len(expected) == len(folders)
    if damage == "delete":
        registry.path.unlink()
    elif damage == "garbage":
        registry.path.write_bytes(os.urandom(8192))
    elif damage == "truncate":
        registry.path.write_bytes(registry.path.read_bytes()[:1000])
    elif damage == "unreadable":
        registry.path.unlink()
        registry.path.mkdir()
    else:
        connection = sqlite3.connect(registry.path)
        connection.execute("drop table runs_2")
        connection.execute("create table runs_2 (data_root text, run_id text, something text)")
        connection.execute("insert into runs_2 values (?, 'x', 'y')", [str(root)])
        connection.commit()
        connection.close()
    assert registry.refresh() == expected
    assert Registry(registry.path.parent, root).refresh() == expected
    assert not recwarn.list


def test_an_index_that_cannot_be_written_is_kept_in_memory(tmp_path: Path, root: Path) -> None:
    make_run(root, 1.0)
    (tmp_path / "file").write_text("")
    assert len(Registry(tmp_path / "file" / "state", root).refresh()) == 1


def test_a_final_row_is_remembered_and_a_live_one_read_again(registry: Registry, root: Path) -> None:
    done, live = make_run(root, 1.0), make_run(root, 2.0)
    rows = {row.run_id: row for row in registry.refresh()}
    registry.record(replace(rows[done.run_id], state="COMPLETED", details='{"gpu_hours": 1.5}', final=True))
    for folder in (done, live):
        write_json(folder.outcome, {"state": "failed", "error": "later", "ended_at": 9.0})
    rows = {row.run_id: row for row in registry.refresh()}
    assert (rows[done.run_id].state, rows[done.run_id].details) == ("COMPLETED", '{"gpu_hours": 1.5}')
    assert rows[live.run_id].state == "FAILED"
    # Forgotten, the folder's word counts again: the index was never the truth.
    registry.path.unlink()
    assert {row.run_id: row.state for row in registry.refresh()} == {
        done.run_id: "FAILED",
        live.run_id: "FAILED",
    }


def test_a_removed_folder_leaves_the_index(registry: Registry, root: Path) -> None:
    gone, stays = make_run(root, 1.0), make_run(root, 2.0)
    registry.record(replace(next(r for r in registry.refresh() if r.run_id == gone.run_id), final=True))
    shutil.rmtree(gone.path)
    assert [row.run_id for row in registry.refresh()] == [stays.run_id]


def test_two_data_roots_share_a_file_and_nothing_else(tmp_path: Path, root: Path, registry: Registry) -> None:
    make_run(root, 1.0)
    other = Registry(registry.path.parent, tmp_path / "other")
    mine = make_run(tmp_path / "other", 2.0)
    assert len(registry.refresh()) == 1
    assert [row.run_id for row in other.refresh()] == [mine.run_id]
    assert len(registry.refresh()) == 1
