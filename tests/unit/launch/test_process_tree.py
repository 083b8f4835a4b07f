"""Processes by identity, and whole trees ended: only what carries our mark."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch import memory_kills, process_tree
from launch.process_tree import RUN_ID_VARIABLE, ProcessIdentity

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def start(code: str, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_recycled_id_is_another_process() -> None:
    me = process_tree.identity(os.getpid())
    assert me is not None and process_tree.is_alive(me)
    assert not process_tree.is_alive(ProcessIdentity(me.pid, me.start + 1, me.host))


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        who = process_tree.identity(process.pid)
        deadline = time.monotonic() + 60
        while process_tree.identity(process.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert Path(f"/proc/{process.pid}").exists(), "nobody has waited for it yet"
        assert who is None or not process_tree.is_alive(who)


def test_a_whole_tree_ends_even_where_term_is_ignored() -> None:
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], stdout=subprocess.PIPE, text=True,"
        " start_new_session=True)\n"
        "child.stdout.readline()\n"
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process_tree.descendants(process.pid) == [child]
        who = process_tree.identity(process.pid)
        assert who is not None
        process_tree.end(who, grace_s=0.3)
        assert process_tree.identity(child) is None and process_tree.identity(process.pid) is None
        assert process.wait() == -signal.SIGKILL


def test_a_run_is_found_by_its_mark() -> None:
    ours = start(STUBBORN, **{RUN_ID_VARIABLE: "test-run-1"})
    other = start(STUBBORN, **{RUN_ID_VARIABLE: "test-run-10"})
    try:
        assert process_tree.of_run("test-run-1") == [ours.pid]
        process_tree.end_run("test-run-1", grace_s=0.2)
        assert ours.wait(timeout=60) == -signal.SIGKILL
        assert other.poll() is None, "another run is left alone"
    finally:
        for process in (ours, other):
            process.kill()
            process.communicate()


def test_a_child_dies_with_us_and_ignores_usr2() -> None:
    middle = (
        "import os, subprocess, sys, signal\n"
        "from launch.process_tree import child_setup\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=child_setup())\n"
        "os.kill(child.pid, signal.SIGUSR2)\n"
        "print(child.pid, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        time.sleep(0.3)
        assert process_tree.identity(child) is not None, "USR2 did not end it"
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while process_tree.identity(child) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process_tree.identity(child) is None, "it got TERM when its parent was killed"


def test_memory_kills_are_read_from_either_cgroup_version(tmp_path: Path) -> None:
    v1, v2 = tmp_path / "v1", tmp_path / "v2"
    v1.write_text("12:cpuset:/\n7:memory:/slurm/job_2/step_0\n0::/unified\n")
    v2.write_text("0::/system.slice/job_3\n")
    folder = tmp_path / "fs" / "memory" / "slurm" / "job_2" / "step_0"
    folder.mkdir(parents=True)
    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    folder = tmp_path / "fs" / "system.slice" / "job_3"
    folder.mkdir(parents=True)
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\n")
    assert memory_kills.count(v1, tmp_path / "fs") == 3
    assert memory_kills.count(v2, tmp_path / "fs") == 2
    assert memory_kills.count(tmp_path / "missing", tmp_path / "fs") == 0
