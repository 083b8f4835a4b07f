"""The process beside a session's client that owns all the client started: gateway, worker jobs, their status files.

`python -m tinker_hpc.session_keeper --run-dir DIR`, started by sessions.py with a pipe as its standard input. While the
pipe is open it keeps the gateway running and writes workers/<k>/status.json from what Slurm says. When the pipe closes
(the client closed the session, or died in whatever way, SIGKILL included) it ends everything by id: the workers are
asked to close, jobs are cancelled, the gateway is ended. A GPU never waits for a notebook that is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from launch import lineage, process_tree
from launch.cancel import cancel
from launch.children import Child, gateway_argv
from launch.gateway_client import close_worker, read_address
from launch.run_record import listed
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.worker_watch import WatchedWorker, WorkerWatch

_TICK_S = 0.5
_CLOSE_GRACE_S = 20.0
"""How long workers get to end by themselves after the close request; cancelling a job that ended is harmless."""
_GATEWAY_GRACE_S = 5.0
_GATEWAY_RESTARTS = 5


class Keeper:
    """Runs until the client is gone, then ends what the session started."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._watch = WorkerWatch(folder)
        self._client = os.getppid()
        self._stop = False
        self._gateway_starts = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._gateway = self._start_gateway()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def run(self) -> None:
        """Keep the session until the pipe closes, then close it."""
        try:
            while not self._stop and self._client_lives():
                self._watch_gateway()
                self._watch.step()
        finally:
            self._close()

    def _client_lives(self) -> bool:
        """Wait one tick for the pipe's end. The parent's id changes too when it dies, should a child hold the pipe."""
        try:
            ready, _, _ = select.select([sys.stdin.fileno()], [], [], _TICK_S)
        except InterruptedError:
            return True
        if ready and not os.read(sys.stdin.fileno(), 4096):
            return False
        return os.getppid() == self._client

    def _start_gateway(self) -> Child:
        self._gateway_starts += 1
        # Not marked with the run's id: cancelling the first worker's job would take the gateway with it.
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return Child("gateway", gateway_argv(self._folder), env, self._folder.logs / "gateway.log")

    def _watch_gateway(self) -> None:
        code = self._gateway.exit_code()
        if code is None or self._gateway_starts > _GATEWAY_RESTARTS:
            return
        print(f"the gateway ended with exit code {code}; starting it again", flush=True)
        time.sleep(0.2 * self._gateway_starts)
        self._gateway = self._start_gateway()

    def _close(self) -> None:
        """End workers, jobs and gateway; each step even if the one before failed."""
        self._watch.find()  # one submitted in the last half second
        address = read_address(self._folder)
        asked = address is not None and self._gateway.exit_code() is None and close_worker(address)
        deadline = time.monotonic() + (_CLOSE_GRACE_S if asked else 0.0)
        for worker in self._watch.workers():
            if worker.written is None or worker.written[0] != "ended":
                self._end_job(worker, deadline)
            write_json(
                worker.folder.status,
                {"phase": "ended", "reason": "the session was closed", "error": None, "since": time.time()},
            )
        gateway = process_tree.identity(self._gateway.pid)
        if gateway is not None and self._gateway.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(gateway.pid, signal.SIGTERM)
            give_up_at = time.monotonic() + _GATEWAY_GRACE_S
            while self._gateway.exit_code() is None and time.monotonic() < give_up_at:
                time.sleep(0.05)
            if self._gateway.exit_code() is None:
                os.kill(gateway.pid, signal.SIGKILL)

    def _end_job(self, worker: WatchedWorker, deadline: float) -> None:
        """Wait for a worker that was asked to close, if it runs at all; then cancel its job, which may have ended."""
        own = worker.run_folder
        while (worker.written or ("queued",))[0] == "ready" and time.monotonic() < deadline:
            if listed(own.outcome):
                break
            time.sleep(0.1)
        for attempt in range(3):
            try:
                if not listed(own.outcome):
                    if not own.cancel.exists():
                        write_json(own.cancel, {"requested_at": time.time(), "host": process_tree.this_host()})
                    cancel(lineage.jobs_of(own))
                return
            except TinkerHpcError as error:
                print(f"{own.run_id}: {error}", flush=True)
                time.sleep(2.0 * (attempt + 1))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m tinker_hpc.session_keeper", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the session's folder on the shared filesystem")
    Keeper(RunFolder(parser.parse_args().run_dir)).run()


if __name__ == "__main__":
    main()
