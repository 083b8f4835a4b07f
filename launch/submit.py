"""Submit a job through submitit; keep what submitit forgets.

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
from dataclasses import asdict

from launch import lineage, process_tree, site
from launch.host import Host, LocalHost
from launch.job_spec import JobSpec
from launch.refusals import gist
from launch.submitted import SubmittedJob
from launch.successor import submit_after
from tinker_hpc.errors import ConfigError, SlurmUnavailableError, SubmissionError
from tinker_hpc.private_files import make_private, write_json
from tinker_hpc.run_folder import RunFolder

WORKER_PACKAGES = ("torch", "megatron", "transformers", "safetensors")
"""What a worker imports that the client side does not need."""


def submit(spec: JobSpec, run_folder: RunFolder, *, host: Host | None = None, again: bool = False) -> SubmittedJob:
    """Submit the job of a run. Once: a repeated call for the same run folder returns the first job.

    Args: again: the run ended and is resumed: its next job, with this spec from now on.

    Raises:
        ConfigError: the worker's packages are not installed.
        SubmissionError: the scheduler refused; its own words and what to change. (Not for a job behind the first, on
            a cluster that needs a ladder of them: that is said on stderr.)
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
        _add_rungs(spec, run_folder, host)
    return job


def _add_rungs(spec: JobSpec, run_folder: RunFolder, host: Host) -> None:
    """Submit the jobs behind the first. It is in the queue, so the run exists: with as many of them as Slurm takes."""
    for number in range(site.LADDER_RUNGS):
        try:
            submit_after(spec, run_folder, host, ["singleton"])
        except (SubmissionError, SlurmUnavailableError) as error:
            print(
                f"tinker-hpc: run {spec.run_id} is submitted, with {number} instead of {site.LADDER_RUNGS} jobs behind "
                f"it that go on if it is ended from outside. {gist(str(getattr(error, 'slurm_words', error)))} (On "
                f"cluster {spec.cluster.name!r} no job can submit the next one, so they are submitted beforehand.) "
                f"Once they are used up, `tinker-hpc resume {spec.serves_run or spec.run_id}` goes on.",
                file=sys.stderr,
            )
            return


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
