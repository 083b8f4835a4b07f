"""Where the ranks of several nodes meet, also where a node's own name is 127.0.1.1 to itself, as Debian installs it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import node as node_module
from launch import own_address as module
from launch.job_spec import JobSpec, Layout
from launch.node import Node, Place
from launch.own_address import gloo_environment, interface_of, own_address
from tinker_hpc.config import ClusterProfile
from tinker_hpc.run_folder import RunFolder

HOSTS = {"debian": "127.0.1.1", "plain": "10.1.0.7", "node1": "127.0.0.1", "node2": "127.0.0.1"}
ROUTES = {"gpu2": "10.1.0.1"}


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An /etc/hosts, and a network on which packets to gpu2 leave from 10.1.0.1, by eth0."""

    def look_up(name: str) -> str:
        if name not in HOSTS:
            raise socket.gaierror(-2, "Name or service not known")
        return HOSTS[name]

    real = module._address_towards
    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(module, "_address_towards", lambda other: ROUTES.get(other) or real(HOSTS.get(other, other)))
    monkeypatch.setattr(module, "interface_of", {"10.1.0.1": "eth0", "127.0.0.1": "lo"}.get)


@pytest.mark.parametrize(
    ("name", "others", "address", "interface"),
    [
        ("plain", ["gpu2"], "10.1.0.7", None),
        ("debian", ["gpu2"], "10.1.0.1", "eth0"),
        ("debian", ["no-such-name.invalid", "gpu2"], "10.1.0.1", "eth0"),
        ("nowhere", ["gpu2"], "10.1.0.1", "eth0"),
        ("debian", ["no-such-name.invalid"], None, None),
        ("debian", [], None, None),
        ("node1", ["node2"], "127.0.0.1", None),  # several nodes on one machine, as tests/slurm has them
    ],
)
def test_the_address_among_the_others(
    hosts: None, name: str, others: list[str], address: str | None, interface: str | None
) -> None:
    assert own_address(name, others) == address
    assert gloo_environment(name, address) == ({} if interface is None else {"GLOO_SOCKET_IFNAME": interface})


def test_interfaces_of_this_machine() -> None:
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.9") is None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What `Node.start_agent` starts, not started."""
    children: list[dict[str, Any]] = []

    def child(name: str, argv: list[str], env: dict[str, str], log: Path) -> None:
        children.append({"argv": argv, "env": env})

    monkeypatch.setattr(node_module, "Child", child)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    yield children
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("rank", "called"), [(0, "10.1.0.1"), (1, "debian")])
def test_what_the_agent_of_a_node_is_told(
    hosts: None, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, rank: int, called: str
) -> None:
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": str(rank),
        "SLURM_JOB_NODELIST": "gpu[1-2]" if rank == 0 else "gpu2,debian",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "debian")
    place = Place.here()
    assert place.other_nodes == ("gpu2",)
    spec = JobSpec("r-1", "run", "r", "m", "/m", ClusterProfile("della"), nodes=2, layout=Layout(1, 2))
    node = Node(spec, RunFolder(Path("/data/runs/r-1")), place)
    node.start_agent(("debian", 29000))
    assert f"--local-addr={called}" in started[0]["argv"]
    assert started[0]["env"]["GLOO_SOCKET_IFNAME"] == "eth0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    node.start_agent(("debian", 29000))
    assert started[1]["env"]["GLOO_SOCKET_IFNAME"] == "ib0", "the user knows better"
