"""Keeps workers/<k>/status.json true for workers whose jobs are elsewhere, from what Slurm says.

The gateway prints a status while futures wait and ends them with its error once the worker is gone. A session's keeper
uses `WorkerWatch`; in a run with several base models the first node starts

    python -m tinker_hpc.worker_watch --run-dir DIR

a process of its own, because a question to Slurm may hang for a minute and the supervisor must not.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from launch import attempts, lineage
from launch.job_state import JobState, JobStatus
from launch.waiting_words import in_words
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.job_watch import JobWatch
from tinker_hpc.patience import Complaint, words_may_be_lost
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder, WorkerFolder

_TICK_S = 0.5
_ASK_SLURM_S = 30.0
"""Between questions to Slurm while nothing changes; CLUSTERS: no oftener, for all jobs of a user together."""
_ASK_SLURM_FIRST_S = 3.0
_ASK_LOCAL_S = 1.0


@dataclass
class WatchedWorker:
    """One worker: its folder beside the gateway, and its jobs, one after another."""

    folder: WorkerFolder
    run_folder: RunFolder
    """Of its jobs."""
    first_seen: float
    written: tuple[str, str] | None = None
    """Phase and reason of status.json."""
    known: tuple[str, str] | None = None
    """The same of when Slurm answered last."""
    since: float = 0.0
    """When it came into that phase."""


def phase_of(
    job: JobStatus, *, ready: bool, before: str = "", known: tuple[str, str] | None = None
) -> tuple[str, str, str | None]:
    """(phase, reason, error) of status.json for a worker's job (pure). Reason is what the SDK prints while it waits.

    Args:
        before: how the job before this one ended, in words; "" for the first.
        known: the phase and reason of when Slurm answered last; None if it never did.
    """
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
    if job.state is JobState.UNKNOWN and known is not None:
        said = f"Slurm does not say how job {job.job_id} is ({job.reason.rstrip('.')})"
        phase = known[0] if known[0] == "starting" else "queued"
        return phase, f"{said}; before that: {known[1]}" if known[1] else said, None
    why = f" ({job.reason})" if job.reason else ""
    start = (
        f", estimated start {time.strftime('%a %H:%M', time.localtime(job.estimated_start))}"
        if job.estimated_start
        else ""
    )
    words = in_words(job.reason, job.job_id)
    more = [f": {words}"] if words else []
    more += [f"; {before}, and the run goes on in this one"] if before else []
    return "queued", f"Slurm {job.slurm_state or job.state.value}{why}{start}, job {job.job_id}{''.join(more)}", None


class WorkerWatch:
    """The workers of one gateway, found as they are declared, and their status files.

    Args:
        folder: the run or session whose gateway they serve.
        linked_only: leave out workers whose job is `folder`'s own (a run's first worker, whose supervisor writes).
    """

    def __init__(self, folder: RunFolder, *, linked_only: bool = False) -> None:
        self._folder = folder
        self._linked_only = linked_only
        self._jobs = JobWatch()
        self._workers: dict[int, WatchedWorker] = {}

    def workers(self) -> list[WatchedWorker]:
        """Those found so far."""
        return list(self._workers.values())

    def step(self) -> None:
        """Look once: new workers, and what became of each. Raises: OSError; what passes, the next step makes good."""
        self.find()
        for worker in self._workers.values():
            self._write_status(worker)

    def find(self) -> None:
        """Look for workers whose job has been submitted since."""
        for folder in self._folder.workers():
            index = int(folder.path.name)
            if index in self._workers or (self._linked_only and not folder.path.is_symlink()):
                continue
            run_folder = RunFolder(folder.path.resolve().parent.parent)
            if lineage.jobs_of(run_folder):
                self._workers[index] = WatchedWorker(folder, run_folder, time.monotonic())

    def _write_status(self, worker: WatchedWorker) -> None:
        own = worker.run_folder
        jobs = lineage.jobs_of(own)
        try:
            status = self._jobs.status(jobs, max_age_s=self._max_age_s(worker, jobs[-1].executor))
        except TinkerHpcError as error:  # Slurm does not answer now; the last word stands
            print(f"{own.run_id}: {error}", flush=True)
            return
        assert status is not None, "a watched worker has a job"
        ready = attempts.takes_requests(own)
        before = attempts.last_end_in_words(own)
        phase, reason, error_text = phase_of(status, ready=ready, before=before, known=worker.known)
        if status.state is not JobState.UNKNOWN:
            worker.known = (phase, reason)
        if worker.written is None or worker.written[0] != phase:
            worker.since = time.time()
        if (phase, reason) != worker.written:
            value = {"phase": phase, "reason": reason, "error": error_text, "since": worker.since}
            write_json(worker.folder.status, value)
            worker.written = (phase, reason)

    def _max_age_s(self, worker: WatchedWorker, executor: str) -> float:
        if executor == "local":
            return _ASK_LOCAL_S
        young = time.monotonic() - worker.first_seen < _ASK_SLURM_S
        return _ASK_SLURM_FIRST_S if young else _ASK_SLURM_S


def main() -> None:
    """Watch the further workers of a run until killed."""
    parser = argparse.ArgumentParser(prog="python -m tinker_hpc.worker_watch", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's folder on the shared filesystem")
    watch = WorkerWatch(RunFolder(parser.parse_args().run_dir), linked_only=True)
    words_may_be_lost()
    complaint = Complaint()
    while True:
        with complaint.instead():
            watch.step()
        time.sleep(_TICK_S)


if __name__ == "__main__":
    main()
