"""The keeper as the process it is, with a gateway that only sleeps or dies and commands that play Slurm: a disk that is
full for a while ends no session and keeps no job from being cancelled, a run's neither; a gateway that cannot live does
end the session."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.submitted import SubmittedJob
from tinker_hpc.config import build_config
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.runs import Run

KEEPER = """
import errno, os, sys
from pathlib import Path
from tinker_hpc import session_keeper

disk, fsync = Path(os.environ["FULL_WHILE"]), os.fsync

def refusing(descriptor):
    if disk.exists():
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    fsync(descriptor)

os.fsync = refusing
gateway = os.environ["GATEWAY"]
session_keeper.gateway_argv = lambda folder: [sys.executable, "-c", gateway]
session_keeper.main()
"""
SLEEPS = "import time; time.sleep(600)"
DIES = "raise SystemExit('OSError: no port is free')"
SQUEUE = """#!/bin/sh
for job in $(cat {slurm}/jobs); do
    id=${{job%%:*}} name=${{job##*:}}
    grep -qw "$id" {slurm}/cancelled || echo "$id|$name|$(cat {slurm}/state)|Priority|||||"
done
"""
SCANCEL = """#!/bin/sh
echo "$@" >> {slurm}/cancelled
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


class Slurm:
    """squeue and scancel, which know the jobs they are told of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in (("squeue", SQUEUE), ("scancel", SCANCEL), ("sacct", "#!/bin/sh\n")):
            (folder / name).write_text(text.format(slurm=folder))
            (folder / name).chmod(0o700)
        (folder / "jobs").touch()
        (folder / "cancelled").touch()
        self.state("PENDING")

    def state(self, word: str) -> None:
        (self.folder / "state").write_text(word)

    def add(self, folder: RunFolder, job_id: str) -> None:
        job = SubmittedJob(job_id, "c", time.time(), folder.run_id, "slurm", str(folder.path))
        write_json(folder.submitted, job.to_json())
        with (self.folder / "jobs").open("a") as file:
            file.write(f"{job_id}:{folder.run_id}\n")

    def cancelled(self) -> list[str]:
        return sorted(line.split()[-1] for line in (self.folder / "cancelled").read_text().splitlines())


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}:{os.environ['PATH']}")
    return Slurm(tmp_path / "slurm")


class Kept:
    """A session of two workers in the queue, and its keeper."""

    def __init__(self, tmp_path: Path, slurm: Slurm, gateway: str) -> None:
        self.full = tmp_path / "full"
        self.folder = RunFolder.new(tmp_path / "root", "s")
        for number, folder in enumerate((self.folder, self.folder.add_worker_run(1))):
            folder.worker(0).create(base_model="m", base_model_folder="/m")
            slurm.add(folder, str(11 + number))
        self.log = self.folder.logs / "keeper.log"
        environ = {**os.environ, "FULL_WHILE": str(self.full), "GATEWAY": gateway}
        with self.log.open("wb") as log:
            argv = [sys.executable, "-c", KEEPER, "--run-dir", str(self.folder.path)]
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environ, start_new_session=True
            )

    def phases(self) -> list[str]:
        files = [worker.status for worker in self.folder.workers()]
        return [json.loads(file.read_text())["phase"] if file.exists() else "" for file in files]

    def close(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)


@pytest.fixture
def keep(tmp_path: Path, slurm: Slurm) -> Iterator[Callable[..., Kept]]:
    kept: list[Kept] = []

    def start(gateway: str, *, full: bool = False) -> Kept:
        (tmp_path / "full").touch() if full else None
        kept.append(Kept(tmp_path, slurm, gateway))
        return kept[-1]

    yield start
    for one in kept:
        (tmp_path / "full").unlink(missing_ok=True)
        one.close()


def test_a_disk_that_is_full_for_a_while_ends_no_session(keep: Callable[..., Kept], slurm: Slurm) -> None:
    kept = keep(SLEEPS)
    assert wait_for(lambda: kept.phases() == ["queued", "queued"])
    kept.full.touch()
    slurm.state("RUNNING")
    assert wait_for(lambda: "the disk refuses" in kept.log.read_text())
    time.sleep(1.5)  # some more steps
    assert kept.process.poll() is None and slurm.cancelled() == []
    assert kept.phases() == ["queued", "queued"]
    kept.full.unlink()
    assert wait_for(lambda: kept.phases() == ["starting", "starting"])
    assert kept.log.read_text().count("the disk refuses") == 1, "said once a minute, not each time"
    assert kept.close() == 0
    assert slurm.cancelled() == ["11", "12"] and kept.phases() == ["ended", "ended"]


def test_a_session_over_quota_ends_its_jobs_all_the_same(keep: Callable[..., Kept], slurm: Slurm) -> None:
    kept = keep(SLEEPS)
    assert wait_for(lambda: kept.phases() == ["queued", "queued"])
    kept.full.touch()
    assert kept.close() == 0
    assert slurm.cancelled() == ["11", "12"]
    assert "cancel.json: Disk quota exceeded" in kept.log.read_text() and "Traceback" not in kept.log.read_text()


def test_a_keeper_that_cannot_go_on_ends_its_jobs_and_says_why(keep: Callable[..., Kept], slurm: Slurm) -> None:
    kept = keep(SLEEPS)
    assert wait_for(lambda: kept.phases() == ["queued", "queued"])
    kept.folder.gateway.write_text("damaged")
    kept.folder.worker(1).status.unlink()
    kept.folder.worker(1).status.mkdir()  # will not pass
    slurm.state("RUNNING")
    assert kept.process.wait(60) == 1
    assert slurm.cancelled() == ["11", "12"]
    status = json.loads(kept.folder.worker(0).status.read_text())
    assert status["phase"] == "ended" and "the session's keeper failed: cannot write" in status["error"]


def test_a_gateway_that_ends_again_and_again_ends_the_session_with_its_words(
    keep: Callable[..., Kept], slurm: Slurm
) -> None:
    kept = keep(DIES, full=True)
    assert wait_for(lambda: "the disk refuses" in kept.log.read_text())
    time.sleep(1.0)
    assert kept.process.poll() is None, "on a full disk it could not have lived"
    kept.full.unlink()
    assert kept.process.wait(60) == 1
    said = kept.log.read_text().splitlines()[-1]
    assert said.startswith("the gateway ended 6 times within a minute: OSError: no port is free. Log: ")
    assert slurm.cancelled() == ["11", "12"]
    status = json.loads(kept.folder.worker(0).status.read_text())
    assert (status["phase"], status["error"]) == ("ended", said), "`tinker-hpc serve` reads it there"


def test_whoever_is_over_quota_can_cancel_a_run(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.new(tmp_path / "root", "r")
    write_json(folder.spec, {})
    slurm.add(folder, "11")
    slurm.add(folder.add_worker_run(1), "12")
    run = Run(folder.run_id, config=build_config({"data_root": str(tmp_path / "root")}, environ={}))

    def refusing(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refusing)
    with caplog.at_level(logging.WARNING):
        run.cancel()
    assert slurm.cancelled() == ["11", "12"]
    assert f"The jobs of run {folder.run_id} are cancelled without it." in caplog.text
    assert not folder.cancel.exists()
