"""One real Slurm cluster per session; clean between tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from continued import TIMES, Numbers, numbers, train
from slurm_machine import INSTALL, REPOSITORY, SlurmCluster

_COMMANDS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "sshd", "unshare", "nsenter")

_CLUSTERS = {"accounting": 0, "faults": 150, "bare": 300}
"""Each cluster's first port, within the 600 of this checkout."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is of the Slurm tier."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each took to recover, passed or not."""
    if TIMES:
        terminalreporter.section("time to recover")
        terminalreporter.write_line("\n".join(TIMES))


def why_not() -> str | None:
    """Why the cluster cannot be brought up here, with the one command that would change it; None if it can."""
    path = f"/usr/sbin:/usr/bin:/sbin:/bin:{os.environ.get('PATH', '')}"
    missing = [command for command in _COMMANDS if shutil.which(command, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed; on Debian or Ubuntu: {INSTALL}"
    if os.geteuid() != 0:
        return "the Slurm test cluster needs root for its namespaces: sudo make slurm"
    probe = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, check=False)
    if probe.returncode:
        return "this container may not make namespaces; give it CAP_SYS_ADMIN (docker run --privileged)"
    return None


def make_cluster(name: str) -> SlurmCluster:
    """A cluster of this checkout's own: two checkouts may test at the same time, and so may its own two clusters."""
    checkout = zlib.crc32(str(REPOSITORY).encode())
    base = Path("/tmp") / f"tinker-hpc-slurm-{checkout:08x}-{name}" / "cluster"
    return SlurmCluster(base, port_base=16_000 + 600 * (checkout % 6) + _CLUSTERS[name])


@pytest.fixture(scope="session")
def cluster_session() -> Iterator[SlurmCluster]:
    """Three nodes with accounting, up for the whole session."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    cluster = make_cluster("accounting")
    cluster.script("down", "--purge")
    cluster.script("up", "--nodes", "3", "--cpus", "8", "--mem", "8000")
    for user in ("alice", "bob"):
        give_configuration(cluster, user)
    yield cluster
    cluster.script("down", "--purge")
    cluster.base.parent.rmdir()


CONFIG = """
[clusters.test]
executor = "slurm"
cpus_per_node = 2
memory = "2G"

[clusters.later]                # a job that waits
executor = "slurm"
extra = ["--begin=now+1hour"]

[clusters.low]                  # a partition whose jobs give way
executor = "slurm"
partition = "low"
memory = "2G"
extra = ["--nodelist=node1"]

[clusters.preemptible]         # the same anywhere, with the loop in a partition whose jobs stay
executor = "slurm"
partition = "low"
driver_partition = "main"
memory = "2G"

[clusters.no_such_partition]
executor = "slurm"
partition = "gpu_huge"

[clusters.no_such_account]
executor = "slurm"
account = "physics"
"""


def give_configuration(cluster: SlurmCluster, user: str) -> None:
    """The user's ~/.config/tinker_hpc/config.toml."""
    home = cluster.home(user)
    owner = home.stat()
    folder = home / ".config" / "tinker_hpc"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    for path in (home / ".config", folder, folder / "config.toml"):
        os.chown(path, owner.st_uid, owner.st_gid)


@pytest.fixture(scope="session")
def unharmed(cluster_session: SlurmCluster) -> Numbers:
    """What the loop of continued.py ends with when nothing happens to it."""
    cluster_session.script("reset")
    return numbers(cluster_session, train(cluster_session))


@pytest.fixture
def cluster(cluster_session: SlurmCluster) -> SlurmCluster:
    """The cluster with no job in it and every node idle."""
    cluster_session.script("reset")
    return cluster_session
