"""What a supervisor asks of the gateway it started: where it is, whether it answers, to close the worker."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from urllib.parse import urlsplit

from tinker_hpc.private_files import read_json
from tinker_hpc.run_folder import RunFolder

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class GatewayAddress:
    """`gateway.json`."""

    base_url: str
    api_key: str
    pid: int


def read_address(run_folder: RunFolder) -> GatewayAddress | None:
    """What the gateway wrote about itself; None before it did."""
    value = read_json(run_folder.gateway)
    return None if value is None else GatewayAddress(value["base_url"], value["api_key"], int(value["pid"]))


def answers(address: GatewayAddress) -> bool:
    """Whether an HTTP server answers there; with what does not matter."""
    return _request(address, "GET", "/api/v1/healthz") is not None


def close_worker(address: GatewayAddress) -> bool:
    """Write the close request, after which the ranks end by themselves. False if the gateway did not accept it."""
    status = _request(address, "POST", "/internal/close")
    return status is not None and status < 300


def _request(address: GatewayAddress, method: str, path: str) -> int | None:
    """HTTP status, or None without an answer."""
    where = urlsplit(address.base_url)
    connection = http.client.HTTPConnection(where.hostname or "127.0.0.1", where.port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers={"X-API-Key": address.api_key})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
