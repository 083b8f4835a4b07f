"""End a run's jobs, wherever they are: in the queue, on nodes, or on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from launch import lineage, process_tree
from launch.host import Host, LocalHost
from launch.run_record import listed
from launch.squeue import live_jobs
from launch.submitted import SubmittedJob
from tinker_hpc.errors import SlurmUnavailableError
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
_CANCEL_ROUNDS = 10
_CANCEL_PAUSE_S = 0.3
CANCEL_GRACE_S = 40.0
"""How long a local job gets to end by itself; its supervisor needs at most parting.LONGEST_S and a few seconds."""


def cancel_run(run_folder: RunFolder) -> None:
    """Say in cancel.json that the run's end was asked for, then end its jobs.

    Whoever is over quota must be able to stop their jobs: where the file is refused they are ended all the same, and
    the refusal is logged. What it would have said, Slurm says of a job that is cancelled.
    Raises: as `cancel`.
    """
    if not listed(run_folder.cancel):
        try:
            write_json(run_folder.cancel, {"requested_at": time.time(), "host": process_tree.this_host()})
        except OSError as error:
            _LOG.warning("%s The jobs of run %s are cancelled without it.", error, run_folder.run_id)
    cancel(lineage.jobs_of(run_folder))


def cancel(jobs: Sequence[SubmittedJob], *, host: Host | None = None) -> None:
    """End a run's jobs, pending or running. Ending what has ended is no error.

    Those that wait go first: else the end of the running one would start them. Asked again until nothing is left that
    was not asked to end, because a job that began just then submits its successor first thing; write cancel.json
    before, or it goes on doing so.

    A local job's whole process tree is gone on return; Slurm ends its own within the cluster's KillWait.
    Raises: SlurmUnavailableError if squeue or scancel fails, with its words.
    """
    host = host or LocalHost()
    for job in jobs:
        if job.executor == "local":
            _cancel_local(job)
    for run_id in dict.fromkeys(job.run_id for job in jobs if job.executor == "slurm"):
        asked: set[str] = set()
        for _ in range(_CANCEL_ROUNDS):
            waiting = [job_id for job_id in live_jobs(run_id, host, pending_only=True) if job_id not in asked]
            if waiting:
                _scancel(run_id, waiting, host)
            running = [job_id for job_id in live_jobs(run_id, host) if job_id not in asked and job_id not in waiting]
            if running:
                _scancel(run_id, running, host)
            if not waiting and not running:
                break
            asked.update(waiting, running)
            time.sleep(_CANCEL_PAUSE_S)


def _scancel(run_id: str, job_ids: Sequence[str], host: Host) -> None:
    result = host.run(["scancel", f"--jobname={run_id}", *job_ids])
    if not result.ok and "Invalid job id" not in result.words:
        raise SlurmUnavailableError(
            f"could not cancel job {', '.join(job_ids)} (run {run_id}): {result.words}. Try again, or: "
            f"scancel --name={run_id}",
            command="scancel",
        )


def _cancel_local(job: SubmittedJob) -> None:
    controller = process_tree.ProcessIdentity(int(job.job_id), job.process_start or 0, job.host or "")
    if controller.host != process_tree.this_host():
        raise SlurmUnavailableError(
            f"run {job.run_id} is a local job on {controller.host}, and this is {process_tree.this_host()}: "
            f"run `tinker-hpc cancel {job.run_id}` there.",
            command="cancel",
        )
    # TERM again and again: submitit's controller drops the signal while it is starting up.
    process_tree.end(controller, grace_s=CANCEL_GRACE_S)
    # The controller may be gone (killed by hand) while what it started is not.
    process_tree.end_run(Path(job.run_folder).name, grace_s=CANCEL_GRACE_S)
