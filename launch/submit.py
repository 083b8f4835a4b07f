"""Send a job and end it, through submitit; keep what submitit forgets.

submitit pickles the supervisor, writes the script and parses the job id. Its own job states and `result()` are not
used: without accounting, or after a preemption, they wait for ever. States come from monitor.py, results from the
run folder.

Written in this order, so that a client killed at any line leaves a run that can be understood:
`run.json`, `workers/0/worker.json`, the script, (sbatch), `submitted.json`.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from launch import process_tree
from launch.host import Host, LocalHost
from launch.job_spec import JobSpec
from launch.submitted import SubmittedJob
from tinker_hpc.errors import SlurmUnavailableError
from tinker_hpc.run_folder import RunFolder, make_private, write_json

__all__ = ["SubmittedJob", "cancel", "submit"]

CANCEL_GRACE_S = 20.0
"""How long a local job gets to end by itself; the supervisor needs at most half of it."""


def submit(spec: JobSpec, run_folder: RunFolder, *, host: Host | None = None) -> SubmittedJob:
    """Submit the job of a run. Once: a repeated call for the same run folder returns the first job.

    Raises:
        SubmissionError: the scheduler refused; its own words and what to change.
        SlurmUnavailableError: no answer. If the job may exist all the same, the message says how to find out.
    """
    from launch.executors import LocalJobExecutor, SlurmJobExecutor  # submitit: 0.1 s that `ls` need not pay
    from launch.supervisor import Supervise

    earlier = SubmittedJob.of(run_folder)
    if earlier is not None:
        return earlier
    host = host or LocalHost()
    make_private(run_folder.slurm)
    make_private(run_folder.logs)
    write_json(run_folder.spec, {**spec.to_json(), "created_at": time.time()})
    worker = run_folder.worker(0)
    if not worker.declaration.exists():
        worker.create(base_model=spec.base_model, base_model_folder=spec.base_model_folder, layout=asdict(spec.layout))
    submitted_at = time.time()
    task = Supervise(str(run_folder.path))
    executor = (
        LocalJobExecutor(spec, run_folder.slurm)
        if spec.cluster.executor == "local"
        else SlurmJobExecutor(spec, run_folder.slurm, host)
    )
    job_id = executor.submit(task).job_id
    local = process_tree.identity(int(job_id)) if spec.cluster.executor == "local" else None
    job = SubmittedJob(
        job_id=job_id,
        cluster=spec.cluster.name,
        submitted_at=submitted_at,
        run_id=spec.run_id,
        executor=spec.cluster.executor,
        run_folder=str(run_folder.path),
        host=local.host if local else None,
        process_start=local.start if local else None,
    )
    write_json(run_folder.submitted, job.to_json())
    return job


def cancel(job: SubmittedJob, *, host: Host | None = None) -> None:
    """End a job, pending or running. Ending one that has ended is no error.

    A local job's whole process tree is gone on return; Slurm ends its own within the cluster's KillWait.
    Raises: SlurmUnavailableError if scancel fails, with its words.
    """
    if job.executor == "local":
        _cancel_local(job)
        return
    result = (host or LocalHost()).run(["scancel", f"--jobname={job.run_id}", job.job_id])
    if not result.ok and "Invalid job id" not in result.words:
        raise SlurmUnavailableError(
            f"could not cancel job {job.job_id} (run {job.run_id}): {result.words}. If it still runs, try again: "
            f"scancel {job.job_id}",
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
