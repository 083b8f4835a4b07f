"""Send a job and end it, through submitit; keep what submitit forgets.

submitit pickles the supervisor, writes the script and parses the job id. Its own job states and `result()` are not
used: without accounting, or after a preemption, they wait for ever. States come from monitor.py, results from the
run folder.

Written in this order, so that a client killed at any line leaves a run that can be understood:
`run.json`, `workers/0/worker.json`, the script, (sbatch), `submitted.json`.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launch import lineage, process_tree, site
from launch.host import Host, LocalHost
from launch.job_spec import JobSpec
from launch.squeue import live_jobs
from launch.submitted import SubmittedJob
from launch.successor import submit_after
from tinker_hpc.errors import ConfigError, SlurmUnavailableError
from tinker_hpc.run_folder import RunFolder, make_private, write_json

__all__ = ["SubmittedJob", "cancel", "submit"]

WORKER_PACKAGES = ("torch", "megatron", "transformers", "safetensors")
"""What a worker imports that the client side does not need."""
_CANCEL_ROUNDS = 10
_CANCEL_PAUSE_S = 0.3
CANCEL_GRACE_S = 40.0
"""How long a local job gets to end by itself; its supervisor needs at most parting.LONGEST_S and a few seconds."""


def submit(spec: JobSpec, run_folder: RunFolder, *, host: Host | None = None, again: bool = False) -> SubmittedJob:
    """Submit the job of a run. Once: a repeated call for the same run folder returns the first job.

    Args: again: the run ended and is resumed: its next job, with this spec from now on.

    Raises:
        ConfigError: the worker's packages are not installed.
        SubmissionError: the scheduler refused; its own words and what to change.
        SlurmUnavailableError: no answer. If the job may exist all the same, the message says how to find out.
    """
    from launch.executors import LocalJobExecutor, SlurmJobExecutor  # submitit: 0.1 s that `ls` need not pay
    from launch.supervisor import Supervise

    earlier = SubmittedJob.of(run_folder)
    if earlier is not None and not again:
        return earlier
    check_packages(spec)
    host = host or LocalHost()
    make_private(run_folder.slurm)
    make_private(run_folder.logs)
    write_json(run_folder.spec, {**spec.to_json(), "created_at": time.time()})
    worker = run_folder.worker(0)
    if not worker.declaration.exists():
        worker.create(base_model=spec.base_model, base_model_folder=spec.base_model_folder, layout=asdict(spec.layout))
    submitted_at = time.time()
    task = Supervise(str(run_folder.path))
    how = site.continuation(run_folder.data_root, spec)
    executor = (
        LocalJobExecutor(spec, run_folder.slurm)
        if spec.cluster.executor == "local"
        else SlurmJobExecutor(spec, run_folder.slurm, host, requeue=how == "requeue")
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
    if earlier is None:
        write_json(run_folder.submitted, job.to_json())
    else:
        lineage.remember(run_folder, job)
    if how == "ladder" and spec.cluster.executor == "slurm":
        for _ in range(site.LADDER_RUNGS):
            submit_after(spec, run_folder, host, ["singleton"])
    return job


def check_packages(spec: JobSpec) -> None:
    """Refuse a worker whose Python, which is this one, lacks its packages: it would say so after its time in the queue.

    Raises: ConfigError. A profile with another `python`, or with `setup` lines that may change it, is not looked at.
    """
    if spec.kind == "driver" or spec.cluster.python is not None or spec.cluster.setup:
        return
    if missing := [name for name in WORKER_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"{sys.executable} has no {', '.join(missing)}, which a worker on cluster {spec.cluster.name!r} needs. "
            'Install them (pip install "tinker_hpc[worker]"), or name a Python that has them: '
            f"`python` in [clusters.{spec.cluster.name}] of the configuration."
        )


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
