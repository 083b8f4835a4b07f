"""`python -m tinker_hpc.gateway --run-dir DIR`: the gateway of one run, until SIGTERM or SIGINT.

The first start picks a free port and a key and writes gateway.json; a restart takes both from there, because the loop's
SDK knows no others, and rebuilds everything else from the request logs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import resource
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn

from tinker_hpc.config import load_config
from tinker_hpc.errors import CorruptLogError, DataRootError, LeaseLostError, TinkerHpcError
from tinker_hpc.gateway.assembly import assemble
from tinker_hpc.gateway.retrieval import HOLD_S
from tinker_hpc.log import Lease
from tinker_hpc.patience import words_may_be_lost
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import RunFolder

HOST = "127.0.0.1"
BACKLOG = 2048
# Longer than any client keeps an idle connection: a server that hangs up first makes the SDK wait a second and retry.
KEEP_ALIVE_S = 600
# A predecessor killed a moment ago may still hold the port.
BIND_PATIENCE_S = 20.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinker_hpc.gateway", description="The gateway of one run.")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's folder under the data root")
    run = RunFolder(parser.parse_args(argv).run_dir.resolve())
    words_may_be_lost()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        serve(run)
    except CorruptLogError as error:
        print(
            f"gateway: {str(error).rstrip('.')}. Nothing was changed. Bring that file back from a snapshot of the "
            "filesystem and start the run again; checkpoints are not affected.",
            file=sys.stderr,
        )
        return 1
    except TinkerHpcError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    return 0


def serve(run: RunFolder, *, hold_s: float = HOLD_S) -> None:
    """Answer until told to stop. Raises: TinkerHpcError if it cannot start."""
    os.umask(0o077)
    _raise_file_limit()
    if not run.path.is_dir():
        raise DataRootError(f"no run folder {run.path}. It is made by tinker_hpc.submit, tinker-hpc run or serve.")
    known: dict[str, Any] = read_json(run.gateway) or {}
    listening = bind(known)
    port = listening.getsockname()[1]
    api_key = known.get("api_key") or f"tml-{secrets.token_urlsafe(32)}"

    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    lease = Lease.acquire(run.gateway_lease, owner, holder="gateway")
    gateway = assemble(run, load_config(), lease, api_key=api_key, hold_s=hold_s)
    gateway.recall()  # before gateway.json: what is wrong with a log ends this process, with words
    superseded: list[str] = []

    def stop(reason: str) -> None:
        superseded.append(reason)
        server.should_exit = True

    gateway.desk.intake.on_superseded = stop
    server = uvicorn.Server(
        uvicorn.Config(
            gateway.application,
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            backlog=BACKLOG,
        )
    )
    write_json(
        run.gateway,
        {
            "base_url": f"http://{HOST}:{port}",
            "api_key": api_key,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_at": time.time(),
        },
    )
    server.run(sockets=[listening])
    if superseded:
        raise LeaseLostError(superseded[0])


def bind(known: dict[str, Any]) -> socket.socket:
    """The listening socket: the port of gateway.json where there is one, a free one otherwise.

    Raises: DataRootError if the known port is held by somebody else for longer than a dying predecessor would.
    """
    port = int(known["base_url"].rpartition(":")[2]) if known else 0
    deadline = time.monotonic() + BIND_PATIENCE_S
    while True:
        # IPPROTO_TCP said aloud: without it asyncio leaves Nagle's algorithm on, and each answer takes 40 ms.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
            listening.listen(BACKLOG)
            return listening
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE:
                raise DataRootError(f"cannot listen on {HOST}:{port}: {error.strerror}.") from error
            if known.get("host") != socket.gethostname():
                port = 0  # another node: whoever knew the old address is not here
                continue
            if time.monotonic() > deadline:
                raise DataRootError(
                    f"port {port} on {HOST} is taken, and the loop of this run knows no other. Is its gateway (pid "
                    f"{known.get('pid')}) still running? Stop it, or start the run again."
                ) from error
            time.sleep(0.2)


def _raise_file_limit() -> None:
    """Each sample in flight holds a connection."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
