"""`cancel`: the end of runs and sessions, and of everything they started."""

from __future__ import annotations

import click

from tinker_hpc.cli.options import json_option
from tinker_hpc.cli.output import emit


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
