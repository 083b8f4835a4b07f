"""How the other nodes of a job reach this one, where its own name does not say so.

Debian's installer writes `127.0.1.1 <host name>` into /etc/hosts (Debian Reference, 5.1.1). Asked for its own name such
a node answers with loopback, which to every other node is that other node itself: with it as the ranks' meeting point,
or as what gloo listens on, all ranks hang at the start.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence

_SIOCGIFADDR = 0x8915
"""netdevice(7)"""
_ANY_PORT = 9


def own_address(hostname: str, others: Sequence[str]) -> str | None:
    """This node's IP address among the nodes of its job.

    What its name says; where that is loopback, what a packet to another node would say it comes from. That is loopback
    too where all nodes are on one machine. None if no other node's name is known here.
    """
    named = _resolved(hostname)
    if named is not None and not ipaddress.ip_address(named).is_loopback:
        return named
    return next((found for other in others if (found := _address_towards(other)) is not None), None)


def gloo_environment(hostname: str, address: str | None) -> Mapping[str, str]:
    """What gloo has to be told where it would listen on what the node's name says, and that is not `address`.

    By itself it takes the host name's address (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp,
    createDefaultDevice). NCCL passes over loopback by itself.
    """
    if address is None or address == _resolved(hostname) or (interface := interface_of(address)) is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": interface}


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asker, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _resolved(hostname: str) -> str | None:
    try:
        return socket.gethostbyname(hostname)
    except OSError:
        return None


def _address_towards(other: str) -> str | None:
    """A datagram socket that is connected sends nothing yet, but has the address it will send from (ip(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, _ANY_PORT))
        except OSError:  # no such name here, or no way to it
            return None
        return probe.getsockname()[0]
