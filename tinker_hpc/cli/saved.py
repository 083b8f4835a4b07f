"""`checkpoints` and `export`: what was saved, and one of them as a folder that peft or transformers loads."""

from __future__ import annotations

from pathlib import Path

import click

from tinker_hpc.cli.options import json_option
from tinker_hpc.cli.output import bytes_written, clock_text, emit, size_text, table


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
@click.option("--merged", is_flag=True, help="The whole model, the adapter added into its weights.")
@json_option
@click.argument("path", metavar="PATH")
def export(path: str, target: Path | None, merged: bool, as_json: bool) -> None:
    """Copy a checkpoint out as a PEFT adapter, or merged into its base model.

    PATH is a tinker:// path, or a run's id for its newest checkpoint. What is merged is a Hugging Face model folder; it
    takes as much room on the disk as the base model, and hardly any memory.
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
    target = target or Path(checkpoint.name)
    if merged:
        from tinker_hpc.base_models import resolve
        from tinker_hpc.merged_export import export_merged

        base = resolve(checkpoint.base_model, load_config().base_models)
        with bytes_written(f"merging into {base.name}") as written:
            folder = export_merged(base.folder, checkpoint.folder, target, written=written).resolve()
    else:
        folder = export_peft(checkpoint, target).resolve()
    if as_json:
        emit({"path": checkpoint.path, "folder": str(folder), "base_model": checkpoint.base_model})
    else:
        click.echo(str(folder))
