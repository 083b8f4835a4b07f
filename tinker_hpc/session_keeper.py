"""The process beside a session's client that owns all the client started: gateway, worker jobs, their status files.

`python -m tinker_hpc.session_keeper --run-dir DIR`, started by sessions.py with a pipe as its standard input. While the
pipe is open it keeps the gateway running and writes workers/<k>/status.json from what Slurm says. When the pipe closes
(the client closed the session, or died in whatever way, SIGKILL included) it ends everything by id: the workers are
asked to close, jobs are cancelled, the gateway is ended. A GPU never waits for a notebook that is gone.

A disk that refuses for a while ends no session, and keeps no job from being cancelled. A gateway that ends again and
again does end it: nobody could reach the worker. The keeper then exits with the reason, which sessions.py tells.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from launch import process_tree
from launch.cancel import cancel_run
from launch.children import Child, gateway_argv
from launch.gateway_client import close_worker, read_address
from launch.log_tail import error_line, last_lines
from launch.run_record import listed
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.patience import Complaint, Wait, need_room, words_may_be_lost
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.worker_watch import WatchedWorker, WorkerWatch

_TICK_S = 0.5
_CLOSE_GRACE_S = 20.0
"""How long workers get to end by themselves after the close request; cancelling a job that ended is harmless."""
_GATEWAY_GRACE_S = 5.0
_DISK_GRACE_S = 5.0
"""How long the last status of the workers may wait for a disk that refuses; what they say is over by then."""
_MAX_STARTS_PER_MINUTE = 5
"""Of the gateway, as in a run (launch/gateway_keeper.py)."""


class Keeper:
    """Runs until the client is gone, then ends what the session started."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._watch = WorkerWatch(folder)
        self._client = os.getppid()
        self._why: str | None = None
        """Why the session is over although its client lives."""
        self._starts: list[float] = []
        self._complaint = Complaint()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._gateway = self._start_gateway()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._why = f"the session's keeper was ended by {signal.Signals(number).name}"

    def run(self) -> str | None:
        """Keep the session until the pipe closes, then close it. Returns: why, if it ended before that."""
        try:
            while self._why is None and self._client_lives():
                with self._complaint.instead():
                    self._watch_gateway()
                    self._watch.step()
        except Exception as error:
            self._why = f"the session's keeper failed: {error}"
            raise
        finally:
            self._close()
        return self._why

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
        self._starts.append(time.monotonic())
        # Not marked with the run's id: cancelling the first worker's job would take the gateway with it.
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        return Child("gateway", gateway_argv(self._folder), env, self._folder.logs / "gateway.log")

    def _watch_gateway(self) -> None:
        """Start a gateway that ended again. Raises: DataRootError on a disk it could not start on; try again later."""
        code = self._gateway.exit_code()
        if code is None:
            return
        need_room(self._folder.logs)
        recent = [at for at in self._starts if time.monotonic() - at < 60]
        if len(recent) > _MAX_STARTS_PER_MINUTE:
            text = self._gateway.log_text()
            said = (error_line(text) or last_lines(text, 3)).rstrip(".") or f"exit code {code}"
            self._why = f"the gateway ended {len(recent)} times within a minute: {said}. Log: {self._gateway.log}"
            return
        print(f"the gateway ended with exit code {code}; starting it again", flush=True)
        time.sleep(0.2 * len(recent))
        self._gateway = self._start_gateway()

    def _close(self) -> None:
        """End workers, jobs and gateway; each step even if the one before failed."""
        asked = False
        with _said():
            self._watch.find()  # one submitted in the last half second
        with _said():
            address = read_address(self._folder)
            asked = address is not None and self._gateway.exit_code() is None and close_worker(address)
        deadline = time.monotonic() + (_CLOSE_GRACE_S if asked else 0.0)
        for worker in self._watch.workers():
            with _said():
                if worker.written is None or worker.written[0] != "ended":
                    self._end_job(worker, deadline)
        wait = Wait(_DISK_GRACE_S)
        for worker in self._watch.workers():
            with _said():
                self._write_end(worker, wait)
        with _said():
            self._end_gateway()

    def _write_end(self, worker: WatchedWorker, wait: Wait) -> None:
        reason = self._why or "the session was closed"
        value = {"phase": "ended", "reason": reason, "error": self._why, "since": time.time()}
        while True:
            try:
                write_json(worker.folder.status, value)
                return
            except OSError as error:
                if not wait.once(error):
                    raise

    def _end_gateway(self) -> None:
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
                    cancel_run(own)
                return
            except (TinkerHpcError, OSError) as error:
                print(f"{own.run_id}: {error}", flush=True)
                time.sleep(2.0 * (attempt + 1))


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """What fails inside is said: the next step of the end comes all the same."""
    try:
        yield
    except Exception as error:
        print(f"tinker_hpc: {type(error).__name__}: {error}", flush=True)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m tinker_hpc.session_keeper", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the session's folder on the shared filesystem")
    words_may_be_lost()
    sys.exit(Keeper(RunFolder(parser.parse_args().run_dir)).run())


if __name__ == "__main__":
    main()
