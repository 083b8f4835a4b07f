"""Before a job works it looks whether its run is its owner's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.supervisor import check_own
from tinker_hpc.errors import DataRootError
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.new(tmp_path / "root", "r")
    write_json(folder.spec, {})
    write_json(folder.gateway, {})
    return folder


def test_a_run_of_ones_own_is_fine(run_folder: RunFolder) -> None:
    check_own(run_folder)
    run_folder.data_root.chmod(0o710)  # something was published: the group may pass
    check_own(run_folder)


@pytest.mark.parametrize("name", ["", "slurm", "logs", "workers", "run.json", "gateway.json"])
def test_what_others_could_read_or_write_is_refused(run_folder: RunFolder, name: str) -> None:
    path = run_folder.path / name
    path.chmod(path.stat().st_mode | 0o040)
    with pytest.raises(DataRootError, match="chmod go="):
        check_own(run_folder)


def test_an_open_data_root_is_refused(run_folder: RunFolder) -> None:
    run_folder.data_root.chmod(0o750)
    with pytest.raises(DataRootError, match="0750"):
        check_own(run_folder)
