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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch import process_tree
from launch.children import Child, gateway_argv
from launch.gateway_client import close_worker, read_address
from launch.job_state import JobState, JobStatus
from launch.run_record import listed
from launch.submit import cancel
from launch.submitted import SubmittedJob
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.job_watch import JobWatch
from tinker_hpc.run_folder import RunFolder, WorkerFolder, write_json

_TICK_S = 0.5
_ASK_SLURM_S = 30.0
"""Between questions to Slurm while nothing changes; CLUSTERS: no oftener, for all jobs of a user together."""
_ASK_SLURM_FIRST_S = 3.0
_ASK_LOCAL_S = 1.0
_CLOSE_GRACE_S = 20.0
"""How long workers get to end by themselves after the close request; cancelling a job that ended is harmless."""
_GATEWAY_GRACE_S = 5.0
_GATEWAY_RESTARTS = 5


@dataclass
class _Worker:
    """One worker of the session: its folder beside the gateway, and its job."""

    folder: WorkerFolder
    job: SubmittedJob
    first_seen: float
    written: tuple[str, str] | None = None


def phase_of(job: JobStatus, *, ready: bool) -> tuple[str, str, str | None]:
    """(phase, reason, error) of status.json for a worker's job (pure). Reason is what the SDK prints while it waits."""
    if job.state.finished:
        said = job.reason or job.slurm_state or job.state.value
        if job.state is JobState.COMPLETED:
            return "ended", "closed", None
        return "ended", said, f"job {job.job_id} of the worker ended {job.state.value}: {said}"
    if ready:
        return "ready", "", None
    if job.state is JobState.RUNNING:
        where = f" on {', '.join(job.nodes)}" if job.nodes else ""
        return "starting", f"job {job.job_id} runs{where}, the model is loading", None
    why = f" ({job.reason})" if job.reason else ""
    start = (
        f", estimated start {time.strftime('%a %H:%M', time.localtime(job.estimated_start))}"
        if job.estimated_start
        else ""
    )
    return "queued", f"Slurm {job.slurm_state or job.state.value}{why}{start}, job {job.job_id}", None


class Keeper:
    """Runs until the client is gone, then ends what the session started."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._workers: dict[int, _Worker] = {}
        self._jobs = JobWatch()
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
                self._find_workers()
                self._write_status()
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

    def _find_workers(self) -> None:
        for folder in self._folder.workers():
            index = int(folder.path.name)
            if index in self._workers:
                continue
            # A further base model's worker has a run folder of its own; workers/<k> is a link into it.
            job = SubmittedJob.of(RunFolder(folder.path.resolve().parent.parent))
            if job is not None:
                self._workers[index] = _Worker(folder, job, time.monotonic())

    def _write_status(self) -> None:
        for worker in self._workers.values():
            # The worker's first words in its result log are that it takes requests.
            ready = any(os.listdir(worker.folder.results))
            try:
                status = self._jobs.status(worker.job, max_age_s=self._max_age_s(worker))
            except TinkerHpcError as error:  # Slurm does not answer now; the last word stands
                print(f"{worker.job.run_id}: {error}", flush=True)
                continue
            phase, reason, error_text = phase_of(status, ready=ready)
            if (phase, reason) != worker.written:
                worker.written = (phase, reason)
                write_json(
                    worker.folder.status,
                    {"phase": phase, "reason": reason, "error": error_text, "since": time.time()},
                )

    def _max_age_s(self, worker: _Worker) -> float:
        if worker.job.executor == "local":
            return _ASK_LOCAL_S
        young = time.monotonic() - worker.first_seen < _ASK_SLURM_S
        return _ASK_SLURM_FIRST_S if young else _ASK_SLURM_S

    def _close(self) -> None:
        """End workers, jobs and gateway; each step even if the one before failed."""
        self._find_workers()  # one submitted in the last half second
        address = read_address(self._folder)
        asked = address is not None and self._gateway.exit_code() is None and close_worker(address)
        deadline = time.monotonic() + (_CLOSE_GRACE_S if asked else 0.0)
        for worker in self._workers.values():
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

    def _end_job(self, worker: _Worker, deadline: float) -> None:
        """Wait for a worker that was asked to close, if it runs at all; then cancel its job, which may have ended."""
        own = RunFolder(worker.folder.path.resolve().parent.parent)
        while (worker.written or ("queued",))[0] == "ready" and time.monotonic() < deadline:
            if listed(own.outcome):
                break
            time.sleep(0.1)
        for attempt in range(3):
            try:
                if not listed(own.outcome):
                    if not own.cancel.exists():
                        write_json(own.cancel, {"requested_at": time.time(), "host": process_tree.this_host()})
                    cancel(worker.job)
                return
            except TinkerHpcError as error:
                print(f"{worker.job.run_id}: {error}", flush=True)
                time.sleep(2.0 * (attempt + 1))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m tinker_hpc.session_keeper", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the session's folder on the shared filesystem")
    Keeper(RunFolder(parser.parse_args().run_dir)).run()


if __name__ == "__main__":
    main()
