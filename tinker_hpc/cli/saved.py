"""`checkpoints` and `export`: what was saved, and one of them as a folder peft loads."""

from __future__ import annotations

from pathlib import Path

import click

from tinker_hpc.cli.options import json_option
from tinker_hpc.cli.output import clock_text, emit, size_text, table


@click.command()
@json_option
@click.argument("run_id", metavar="[ID]", required=False)
def checkpoints(run_id: str | None, as_json: bool) -> None:
    """List saved states and sampler weights."""
    from tinker_hpc.checkpoints import all_checkpoints
    from tinker_hpc.config import load_config
    from tinker_hpc.runs import Run

    found = Run(run_id).checkpoints() if run_id else all_checkpoints(load_config().data_root)
    if as_json:
        emit([checkpoint.to_json() for checkpoint in found])
        return
    table(
        ("PATH", "BASE MODEL", "SIZE", "SAVED"),
        [(c.path, c.base_model, size_text(c.size_bytes), clock_text(c.created_at)) for c in found],
    )


@click.command()
@click.option("--to", "target", type=click.Path(path_type=Path), metavar="FOLDER", help="New folder (./NAME).")
@json_option
@click.argument("path", metavar="PATH")
def export(path: str, target: Path | None, as_json: bool) -> None:
    """Copy a checkpoint out as a PEFT adapter.

    PATH is a tinker:// path, or a run's id for its newest checkpoint.
    """
    from tinker_hpc.checkpoints import export_peft, find_checkpoint
    from tinker_hpc.config import load_config
    from tinker_hpc.errors import ConfigError
    from tinker_hpc.runs import Run

    if path.startswith("tinker://"):
        checkpoint = find_checkpoint(load_config().data_root, path)
    else:
        saved = Run(path).checkpoints()
        if not saved:
            raise ConfigError(
                f"run {path} has saved no checkpoint; save_state() or save_weights_for_sampler() makes one."
            )
        checkpoint = saved[-1]
    folder = export_peft(checkpoint, target or Path(checkpoint.name)).resolve()
    if as_json:
        emit({"path": checkpoint.path, "folder": str(folder), "base_model": checkpoint.base_model})
    else:
        click.echo(str(folder))
