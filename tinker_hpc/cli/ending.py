"""`cancel`: the end of runs and sessions, and of everything they started. `resume`: one that ended goes on."""

from __future__ import annotations

import click

from tinker_hpc.cli.options import json_option, size_options
from tinker_hpc.cli.output import emit
from tinker_hpc.resources import Resources


@click.command()
@json_option
@click.argument("run_ids", nargs=-1, required=True, metavar="ID...")
def cancel(run_ids: tuple[str, ...], as_json: bool) -> None:
    """End runs or sessions and everything they started."""
    from tinker_hpc.runs import Run

    runs = [Run(run_id) for run_id in run_ids]  # all ids are checked before the first one ends
    for run in runs:
        was_over = run.status().finished
        run.cancel()
        if as_json:
            emit({"id": run.id, "cancelled": not was_over, "state": run.status().state.value})
        else:
            click.echo(f"{run.id} " + ("was over already" if was_over else "cancelled"))


@click.command()
@click.argument("run_id", metavar="ID")
@click.option("--cluster", metavar="C", help="Another profile of the configuration.")
@size_options
@json_option
def resume(run_id: str, cluster: str | None, resources: Resources, as_json: bool) -> None:
    """Go on with a run that ended, also elsewhere or with other sizes."""
    from tinker_hpc.resume import resume as resume_run

    run = resume_run(run_id, cluster=cluster, resources=resources)
    now = run.status()
    if as_json:
        emit({"id": run.id, "job_id": now.job_id, "job_ids": list(now.job_ids), "state": now.state.value})
    else:
        click.echo(f"{run.id} goes on in job {now.job_id}")
