"""A disk that refuses for a while is waited for; what will not pass is not."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import attempts
from tinker_hpc.errors import DataRootError
from tinker_hpc.patience import passes, until_written
from tinker_hpc.payload import dump_call, load_outcome
from tinker_hpc.private_files import write_bytes
from tinker_hpc.run_folder import RunFolder


class Disk:
    """Refuses so many times."""

    def __init__(self, times: int, error: OSError) -> None:
        self.times, self.error, self.slept = times, error, 0.0

    def write(self) -> str:
        if self.times:
            self.times -= 1
            raise self.error
        return "written"

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def wrapped(number: int) -> DataRootError:
    try:
        try:
            raise OSError(number, "no")
        except OSError as error:
            raise DataRootError("cannot write") from error
    except DataRootError as error:
        return error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), wrapped(errno.EROFS)])
def test_it_is_waited_for(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    disk = Disk(5, error)
    assert until_written(disk.write, sleep=disk.sleep) == "written" and disk.slept == 5.0
    assert capsys.readouterr().out.count("the disk refuses") == 1, "said once a minute, not each time"


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "closed"), wrapped(errno.EACCES), DataRootError("x")])
def test_what_will_not_pass_is_raised(error: OSError) -> None:
    assert not passes(error)
    with pytest.raises(OSError):
        until_written(Disk(1, error).write, sleep=lambda _: None)


def test_a_claim_on_a_full_disk_is_made_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name can be made on a full disk, what is in it not: the claim is completed, not made a second time."""
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    folder = RunFolder.new(root, "r")
    refusals = iter([OSError(errno.ENOSPC, "full")] * 2)
    real = attempts.os.pwrite

    def pwrite(*arguments: object) -> int:
        if (error := next(refusals, None)) is not None:
            raise error
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(attempts.os, "pwrite", pwrite)
    monkeypatch.setattr("tinker_hpc.patience._PAUSE_S", 0.0)
    assert attempts.begin(folder, {"job_id": "1", "host": "n", "pid": 1}) == 1
    assert attempts.claim_of(folder, 1)["job_id"] == "1" and attempts.holder(folder) == 1


def test_speaking_on_a_full_disk_ends_nobody(tmp_path: Path) -> None:
    """/dev/full refuses every write with ENOSPC, as the full disk does that a job's log lies on."""
    program = (
        "import sys; from pathlib import Path; from tinker_hpc.patience import words_may_be_lost; words_may_be_lost();"
        "print('full', flush=True); print('full', file=sys.stderr); Path(sys.argv[1]).write_text('went on')"
    )
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-u", "-c", program, str(tmp_path / "note")]
        done = subprocess.run(argv, stdout=full, stderr=full, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "note").read_text() == "went on"


def returns_on_a_full_disk(full: str) -> int:
    """Its print goes to /dev/full; from its end on nothing can be made durable."""
    print("the last step")
    Path(full).touch()
    return 42


LOOP = """
import errno, os, sys
from pathlib import Path
from tinker_hpc import loop

disk, fsync = Path(sys.argv.pop(1)), os.fsync

def refusing(descriptor):
    if disk.exists():
        raise OSError(errno.ENOSPC, "No space left on device")
    fsync(descriptor)

os.fsync = refusing
loop.main()
"""


def test_what_a_loop_returned_waits_for_the_disk(tmp_path: Path) -> None:
    folder, full = RunFolder.new(tmp_path / "root", "r"), tmp_path / "full"
    write_bytes(folder.payload, dump_call(returns_on_a_full_disk, (str(full),), {}))
    with open("/dev/full", "w") as log:
        argv = [sys.executable, "-u", "-c", LOOP, str(full), "--run-dir", str(folder.path)]
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    give_up_at = time.monotonic() + 60
    while not full.exists() and process.poll() is None and time.monotonic() < give_up_at:
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    assert not folder.result.exists()
    full.unlink()
    assert process.wait(60) == 0
    assert load_outcome(folder.result.read_bytes()).value == 42
