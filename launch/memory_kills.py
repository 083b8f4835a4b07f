"""How many processes of this job the kernel killed on this node for want of memory.

Slurm's own word is not enough: a job whose ranks were killed but whose supervisor ended in good order is FAILED to
Slurm 22.05, with the kills mentioned only in a log.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def count(proc: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Kills counted by the memory cgroup this process is in; 0 where nothing is counted."""
    for counters in _counter_files(proc, cgroups):
        try:
            pairs = dict(line.split(maxsplit=1) for line in counters.read_text().splitlines() if " " in line)
            return int(pairs.get("oom_kill", 0))
        except (OSError, ValueError):
            continue
    return 0


def _counter_files(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Where the counter may be: cgroup v1's memory controller, then v2's one tree."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "7:memory:/slurm/uid_1/job_2/step_0/task_0" (v1), "0::/system.slice/..." (v2)
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield cgroups / "memory" / path.lstrip("/") / "memory.oom_control"
        elif controllers == "":
            yield cgroups / path.lstrip("/") / "memory.events"
