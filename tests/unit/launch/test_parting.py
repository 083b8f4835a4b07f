"""How long ranks get to put their state away, and that everything ends afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from launch import parting, process_tree

TAKES_A_MOMENT = """
import signal, sys, time
def part(number, frame):
    time.sleep({seconds})
    print("parted", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, part)
print("up", flush=True)
time.sleep(60)
"""


def test_somebody_elses_kill_leaves_time_for_a_note() -> None:
    assert parting.patience_s(killed_in_s=None) == parting.LONGEST_S
    assert parting.patience_s(killed_in_s=30.0) == parting.LONGEST_S
    assert parting.patience_s(killed_in_s=5.0) == 5.0 - parting.RESERVE_S
    assert parting.patience_s(killed_in_s=1.0) == parting.patience_s(killed_in_s=-9.0) == 0.0


def started(seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", TAKES_A_MOMENT.format(seconds=seconds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def end(process: subprocess.Popen[str], *, patience_s: float, grace_s: float) -> float:
    """As the supervisor ends what it started; but only below a process of our own."""
    return parting.end_below(os.getpid(), parts=lambda: process.poll() is None, patience_s=patience_s, grace_s=grace_s)


def test_ranks_may_take_longer_than_everything_else_and_no_longer_than_they_need(monkeypatch) -> None:
    process = started(1.0)
    monkeypatch.setattr(process_tree, "descendants", lambda pid: [process.pid] if process.poll() is None else [])
    assert 0.9 < end(process, patience_s=60.0, grace_s=0.0) < 50.0
    assert process.returncode == 3 and process.communicate()[0] == "parted\n"


def test_who_takes_too_long_is_killed(monkeypatch) -> None:
    process = started(60.0)
    monkeypatch.setattr(process_tree, "descendants", lambda pid: [process.pid] if process.poll() is None else [])
    began = time.monotonic()
    end(process, patience_s=0.5, grace_s=0.2)
    assert process.wait(60) == -signal.SIGKILL and process.communicate()[0] == ""
    assert time.monotonic() - began < 50.0
