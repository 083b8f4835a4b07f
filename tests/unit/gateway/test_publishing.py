"""A published checkpoint is readable by the group, and nothing else is."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_gateway_checkpoints import write

from tinker_hpc.errors import RequestError
from tinker_hpc.gateway import checkpoints, publishing
from tinker_hpc.gateway.checkpoints import Checkpoint
from tinker_hpc.private_files import check_data_root

PATHS = ("tinker://s-1:train:0/weights/a", "tinker://s-1:train:0/weights/b", "tinker://s-2:train:0/weights/a")


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="publishing-") as name:
        os.chmod(name, 0o711)
        root = Path(name) / "root"
        root.mkdir(mode=0o700)
        for path in PATHS:
            write(root, path)
        for folder, _, files in os.walk(root):
            os.chmod(folder, 0o700)
            for file in files:
                os.chmod(Path(folder) / file, 0o600)
        (root / "runs").mkdir(mode=0o755)  # as an older version may have left it
        (root / "runs" / "gateway.json").write_text("key")
        yield root


def found(root: Path, path: str) -> Checkpoint:
    return checkpoints.load(root, path)


def modes(root: Path) -> dict[str, int]:
    every = [root, *sorted(root.rglob("*"))]
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in every}


def test_the_group_reads_that_one_and_passes_the_folders_above(root):
    before = modes(root)
    publishing.publish(found(root, PATHS[0]), root)
    opened = {path: mode for path, mode in modes(root).items() if mode & 0o077 and path != "runs/gateway.json"}
    folder = "checkpoints/s-1_train_0/weights"
    assert opened == {
        ".": 0o710,
        "checkpoints": 0o710,
        "checkpoints/s-1_train_0": 0o710,
        folder: 0o710,
        f"{folder}/a": 0o750,
        f"{folder}/a/adapter_model.safetensors": 0o640,
        f"{folder}/a/checkpoint.json": 0o640,
    }
    assert modes(root)["runs"] == 0o700, "what an older version left open is closed first"
    assert found(root, PATHS[0]).public and not found(root, PATHS[1]).public
    check_data_root(root)  # and the next start does not refuse it
    publishing.unpublish(found(root, PATHS[0]), root)
    assert modes(root) == {**before, "runs": 0o700}


def test_folders_above_stay_open_while_another_is_published(root):
    for path in PATHS[:2]:
        publishing.publish(found(root, path), root)
    publishing.unpublish(found(root, PATHS[0]), root)
    assert root.stat().st_mode & 0o777 == 0o710 and found(root, PATHS[1]).public
    publishing.unpublish(found(root, PATHS[1]), root)
    assert root.stat().st_mode & 0o777 == 0o700


def test_it_is_refused_where_nobody_could_come(root):
    os.chmod(root.parent, 0o700)
    with pytest.raises(RequestError, match="lets nobody but its owner through"):
        publishing.publish(found(root, PATHS[0]), root)
    assert not found(root, PATHS[0]).public and root.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root; run as root: pytest tests/unit/gateway")
@pytest.mark.parametrize(("group", "reads"), [(4242, True), (4343, False)])
def test_another_user_of_the_group_reads_it_and_nothing_else(root, group, reads):
    os.chown(root, -1, 4242)
    publishing.publish(found(root, PATHS[0]), root)

    def as_another(*argv: str) -> int:
        done = subprocess.run(argv, user=54321, group=group, extra_groups=[], capture_output=True, check=False)
        return done.returncode

    published = found(root, PATHS[0]).folder
    assert (as_another("cat", str(published / "adapter_model.safetensors")) == 0) is reads
    assert (as_another("ls", str(published)) == 0) is reads
    for closed in (root, root / "runs", root / "checkpoints", published.parent, found(root, PATHS[1]).folder):
        assert as_another("ls", str(closed)) != 0, closed
    assert as_another("cat", str(root / "runs" / "gateway.json")) != 0
    assert as_another("touch", str(published / "x")) != 0
