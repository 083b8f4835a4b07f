"""The memory that a job's control group leaves, from the files of both versions as kernels write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adapters.host_memory import free_host_memory

GIB = 2**30
MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1000 kB\nMemAvailable: {32 * GIB // 1024} kB\nHugePages_Total: 0"
JOB = "slurm/uid_0/job_7/step_0"
V1_UNLIMITED = 9223372036854771712


def node(folder: Path, cgroup: str, groups: dict[str, dict[str, object]]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup."""
    proc, mount = folder / "proc", folder / "cgroup"
    files: dict[Path, object] = {proc / "meminfo": MEMINFO, proc / "self/cgroup": cgroup}
    files |= {mount / group / name: text for group, named in groups.items() for name, text in named.items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return proc, mount


def v2(limit: object, *, anon: int, file: int, shmem: int = 0) -> dict[str, object]:
    """A fifth of the page cache was used lately."""
    stat = f"anon {anon}\nfile {file + shmem}\nshmem {shmem}\ninactive_anon {anon}\nactive_anon {shmem}\n"
    stat += f"inactive_file {file - file // 5}\nactive_file {file // 5}"
    return {"memory.max": limit, "memory.current": anon + file + shmem, "memory.stat": stat}


def v1(limit: object, *, anon: int, file: int) -> dict[str, object]:
    """Everything is in groups below, which only the totals count."""
    stat = f"cache 0\nrss 0\ninactive_file 0\nactive_file 0\nhierarchical_memory_limit {limit}\ntotal_cache {file}\n"
    stat += f"total_rss {anon}\ntotal_inactive_file {file - file // 5}\ntotal_active_file {file // 5}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": anon + file, "memory.stat": stat}


@pytest.mark.parametrize(
    ("version", "cgroup", "top"),
    [(v2, f"0::/{JOB}", ""), (v1, f"9:name=systemd:/\n4:cpuset,memory:/{JOB}\n3:cpu:/{JOB}\n0::/", "memory/")],
)
def test_page_cache_counts_as_free_and_a_limit_binds_at_any_level(tmp_path: Path, version, cgroup, top) -> None:
    step = version({v2: "max", v1: V1_UNLIMITED}[version], anon=2 * GIB, file=6 * GIB - 2**26)
    job = version(8 * GIB, anon=2 * GIB, file=6 * GIB - 2**26)  # full of the checkpoint just read
    proc, mount = node(tmp_path, cgroup, {top + JOB: step, top + "slurm/uid_0/job_7": job})
    assert free_host_memory(proc, mount) == 6 * GIB


def test_what_is_in_a_tmpfs_is_not_free(tmp_path: Path) -> None:
    proc, mount = node(tmp_path, f"0::/{JOB}", {JOB: v2(8 * GIB, anon=2 * GIB, file=GIB, shmem=3 * GIB)})
    assert free_host_memory(proc, mount) == 3 * GIB


def test_more_in_use_than_a_limit_that_was_lowered_leaves_nothing(tmp_path: Path) -> None:
    proc, mount = node(tmp_path, f"0::/{JOB}", {JOB: v2(GIB, anon=2 * GIB, file=0)})
    assert free_host_memory(proc, mount) == 0


@pytest.mark.parametrize("cgroup", [f"0::/{JOB}", "4:memory:/docker/abc\n0::/", "3:cpu:/"])
def test_without_a_limit_it_is_what_the_kernel_calls_available(tmp_path: Path, cgroup: str) -> None:
    roomy = {JOB: v2(100 * GIB, anon=GIB, file=0), "memory": v1(V1_UNLIMITED, anon=40 * GIB, file=GIB)}
    proc, mount = node(tmp_path, cgroup, roomy)
    assert free_host_memory(proc, mount) == 32 * GIB


def test_this_machine() -> None:
    assert free_host_memory() > 2**26
