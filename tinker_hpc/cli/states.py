"""`ls` and `status`: own files first, then one batched squeue, then accounting."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import click

from launch import lineage
from launch.failure import duration_text
from launch.job_state import JobState, JobStatus
from launch.submitted import SubmittedJob
from launch.waiting_words import in_words
from tinker_hpc.cli.options import json_option
from tinker_hpc.cli.output import age_text, clock_text, emit, fields, table
from tinker_hpc.config import Config, load_config
from tinker_hpc.errors import DataRootError
from tinker_hpc.job_watch import JobWatch
from tinker_hpc.registry import Registry, RunRow
from tinker_hpc.run_folder import RunFolder
from tinker_hpc.run_state import RunStatus, combine, read_own_files
from tinker_hpc.runs import Run

# Accounting knows a job's memory and GPU-hours seconds to minutes after its end; then a row is not looked at again.
_ACCOUNTING_LAG_S = 600.0


@click.command()
@click.option("-n", "limit", type=click.IntRange(min=0), default=20, show_default=True, help="How many; 0 is all.")
@json_option
def ls(limit: int, as_json: bool) -> None:
    """List runs and sessions, newest first."""
    statuses = current_statuses(load_config(), limit=limit)
    if as_json:
        emit([status.to_json() for status in statuses])
        return
    rows = [
        (s.id, s.state.value, s.cluster, s.job_id or "", s.base_model, age_text(s.created_at), reason_text(s))
        for s in statuses
    ]
    table(("ID", "STATE", "CLUSTER", "JOB", "BASE MODEL", "AGE", "REASON"), rows)


@click.command()
@click.argument("run_id", metavar="ID")
@json_option
def status(run_id: str, as_json: bool) -> None:
    """Show how one run is doing."""
    run = Run(run_id)
    now = run.status()
    metrics = run.metrics()
    last = metrics[-1] if metrics else {}
    if as_json:
        emit({**now.to_json(), "folder": str(run.folder.path), "last_metrics": last or None})
        return
    fields(
        {
            "id": now.id,
            "state": now.state.value
            + (f"  ({now.slurm_state})" if now.slurm_state not in ("", now.state.value) else ""),
            "reason": reason_text(now),
            "worker": f"{now.phase} since {clock_text(now.phase_since)}" if now.phase_since else now.phase,
            "cluster": now.cluster,
            "job": now.job_id,
            "all jobs": ", ".join(now.job_ids) if len(now.job_ids) > 1 else None,
            "nodes": ", ".join(now.nodes),
            "base model": now.base_model,
            "submitted": clock_text(now.created_at),
            "estimated start": clock_text(now.estimated_start),
            "started": clock_text(now.start),
            "ended": clock_text(now.end),
            "elapsed": duration_text(now.elapsed_s) if now.elapsed_s is not None else None,
            "exit code": now.exit_code,
            "GPU-hours": f"{now.gpu_hours:.2f}" if now.gpu_hours is not None else None,
            "peak memory": f"{now.peak_memory_gib:.1f} GiB" if now.peak_memory_gib is not None else None,
            "step": last.get("step"),
            "loss per token": f"{last['loss_per_token']:.6g}" if last.get("loss_per_token") is not None else None,
            "folder": run.folder.path,
        }
    )


def reason_text(status: RunStatus) -> str:
    """Why it waits or how it ended; beside Slurm's own word for waiting what it means (pure)."""
    words = in_words(status.reason, status.job_id) if status.state is JobState.PENDING else ""
    return f"{status.reason}: {words}" if words else status.reason


def current_statuses(config: Config, *, limit: int = 0) -> list[RunStatus]:
    """The status of the newest runs. Slurm is asked once, for those whose end is not on record yet.

    That there is no data root, and which runs are left out since their files are damaged, is said on standard error.
    """
    registry = Registry(config.state_dir, config.data_root)
    rows = registry.refresh()
    if not config.data_root.exists():
        _say(
            f"there is no folder {config.data_root} yet; the first run makes it. Where there are runs already, set "
            "data_root in the configuration file, or TINKER_HPC_DATA_ROOT, to the folder they are in."
        )
    rows = rows[:limit] if limit else rows
    folders = {row.run_id: RunFolder(config.data_root / "runs" / row.run_id) for row in rows}
    open_jobs: dict[str, list[SubmittedJob]] = {}
    damaged: set[str] = set()
    for row in rows:
        try:
            if not row.final and (jobs := lineage.jobs_of(folders[row.run_id])):
                open_jobs[row.run_id] = jobs
        except DataRootError as error:  # one bad run must not hide the others
            _say(str(error))
            damaged.add(row.run_id)
    states = JobWatch().statuses(open_jobs, max_age_s=0.0) if open_jobs else {}
    statuses = []
    for row in rows:
        if row.run_id in damaged:
            continue
        if row.final and row.details:
            statuses.append(RunStatus.from_json(json.loads(row.details)))
            continue
        job = states.get(row.run_id)
        try:
            now = combine(row.run_id, read_own_files(folders[row.run_id]), job)
        except DataRootError as error:
            _say(str(error))
            continue
        statuses.append(now)
        if is_final(now, job, time.time()):
            registry.record(_row(row, now))
    return statuses


def _say(message: str) -> None:
    click.echo(f"tinker-hpc: {message}", err=True)


def is_final(status: RunStatus, job: JobStatus | None, now: float) -> bool:
    """Whether nothing more will become known of a run (pure)."""
    if job is None or not (status.state.finished and job.state.finished):
        return False
    accounted = job.peak_memory_gib is not None
    return accounted or now - (status.end or now) > _ACCOUNTING_LAG_S


def _row(row: RunRow, status: RunStatus) -> RunRow:
    return replace(
        row,
        state=status.state.value,
        reason=status.reason,
        ended_at=status.end,
        final=True,
        details=json.dumps(status.to_json()),
    )
