"""Processes that stand still are found, and only those, and not while their whole job is suspended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from launch import process_tree
from launch.process_tree import ProcessIdentity
from launch.stopped import LOOK_EVERY_S, STOPPED_S, StoppedWatch

RANK = ProcessIdentity(7, 100, "node1")
OTHER = ProcessIdentity(8, 100, "node1")


def test_a_process_must_stand_still_for_a_while() -> None:
    watch = StoppedWatch(6.0)
    assert watch.look([RANK], 100.0) == []
    assert watch.look([RANK], 102.0) == []
    assert watch.look([RANK, OTHER], 104.0) == []
    assert watch.look([RANK, OTHER], 106.0) == [RANK]
    assert watch.look([OTHER], 108.0) == [], "it runs again, or is gone"
    assert watch.look([RANK, OTHER], 110.0) == [OTHER], "and begins anew"


def test_time_while_the_job_is_suspended_does_not_count() -> None:
    watch = StoppedWatch()
    assert watch.look([RANK], 0.0) == []
    assert watch.look([RANK], 3600.0) == [], "the watch itself stood still for an hour"
    looks = [watch.look([RANK], 3600.0 + n * LOOK_EVERY_S) for n in range(1, 30)]
    first = next(n for n, found in enumerate(looks) if found)
    assert STOPPED_S - 3 * LOOK_EVERY_S <= first * LOOK_EVERY_S <= STOPPED_S


def test_a_stopped_process_is_seen_and_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        pids = [os.getpid(), child.pid, 2**30]
        assert process_tree.stopped(pids) == []
        child.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not (found := process_tree.stopped(pids)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [who.pid for who in found] == [child.pid]
        process_tree.kill(ProcessIdentity(child.pid, found[0].start + 1, found[0].host))
        assert process_tree.stopped([child.pid]) == found, "another process of that id is left alone"
        process_tree.kill(found[0])
        assert child.wait(60) == -signal.SIGKILL
