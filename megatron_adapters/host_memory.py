"""How much memory this node, or this job, has left for its processes.

A Slurm job's limit is that of a control group: version 2 (one hierarchy) or version 1 (the memory controller has its
own), which many nodes still run. The files are those of the kernel's Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/memory.rst. What a group uses includes the page cache that its processes filled, by reading a checkpoint for
one; the kernel takes that back before it refuses memory, so it counts as free, as it does in MemAvailable. Files in a
tmpfs cannot be taken back; `memory.stat` counts them as anonymous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Controller:
    """The names of a memory controller's files, and of the lines of page cache in `memory.stat`.

    `usage` counts the groups below; so do these lines.
    """

    limit: str
    usage: str
    page_cache: tuple[str, str]


V2 = Controller("memory.max", "memory.current", ("active_file", "inactive_file"))
V1 = Controller("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def free_host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: what the kernel calls available, or what the cgroup (a Slurm job's limit) leaves, if that is less."""
    free = available((proc / "meminfo").read_text())
    for controller, folder in groups((proc / "self/cgroup").read_text(), cgroups):
        try:
            limit, usage = ((folder / name).read_text() for name in (controller.limit, controller.usage))
            stat = (folder / "memory.stat").read_text()
        except OSError:  # version 2's root has no limit, and a container does not see the groups above its own
            continue
        left = left_by(controller, limit=limit, usage=usage, stat=stat)
        free = free if left is None else min(free, left)
    return free


def available(meminfo: str) -> int:
    """Bytes of MemAvailable."""
    return _numbers(meminfo)["MemAvailable:"] * 1024


def groups(cgroup: str, mount: Path) -> Sequence[tuple[Controller, Path]]:
    """The groups that a process is in, from its /proc/self/cgroup: a limit binds whichever level sets it."""
    found = []
    for line in cgroup.splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            controller, top = V2, mount
        elif "memory" in controllers.split(","):
            controller, top = V1, mount / "memory"
        else:
            continue
        folder = top / group.lstrip("/")
        found += [(controller, level) for level in (folder, *folder.parents) if level.is_relative_to(top)]
    return found


def left_by(controller: Controller, *, limit: str, usage: str, stat: str) -> int | None:
    """Bytes that a group leaves, from the text of its files; None where it has no limit."""
    if limit.strip() == "max":  # version 1 says so with a number that is larger than any memory
        return None
    lines = _numbers(stat)
    return max(0, int(limit) - int(usage) + sum(lines.get(name, 0) for name in controller.page_cache))


def _numbers(text: str) -> dict[str, int]:
    """Lines of "name number ..."."""
    return {name: int(number) for name, number, *_ in (line.split() for line in text.splitlines())}
