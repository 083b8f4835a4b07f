"""`metrics` and `plot`: what the worker measured at each optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tinker_hpc.cli.options import json_option
from tinker_hpc.cli.output import emit, table

_SHOWN = (
    "step", "loss_per_token", "grad_norm", "learning_rate", "num_tokens", "sampler_gap_mean", "pass_time_s",
    "optim_time_s",
)  # fmt: skip


@click.command()
@click.option(
    "--tail", type=click.IntRange(min=0), default=20, show_default=True, metavar="N", help="The last N steps; 0 is all."
)
@json_option
@click.argument("run_id", metavar="ID")
def metrics(run_id: str, tail: int, as_json: bool) -> None:
    """Print the numbers of each optimizer step."""
    from tinker_hpc.runs import Run

    rows = Run(run_id).metrics()
    rows = rows[-tail:] if tail else rows
    if as_json:
        emit(rows)
        return
    models = sorted({str(row.get("model_id", "")) for row in rows})
    names = [*(["model_id"] if len(models) > 1 else []), *_SHOWN]
    table([name.upper() for name in names], [[_text(row.get(name)) for name in names] for row in rows])


@click.command()
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="The PNG to write (ID.png).")
@click.option("--key", "keys", multiple=True, help="Metric to draw; may be repeated (loss_per_token, grad_norm).")
@json_option
@click.argument("run_id", metavar="ID")
def plot(run_id: str, out: Path | None, keys: tuple[str, ...], as_json: bool) -> None:
    """Draw a run's metrics as a PNG."""
    from tinker_hpc.plotting import plot_metrics
    from tinker_hpc.runs import Run

    path = plot_metrics(Run(run_id).metrics(), out or Path(f"{run_id}.png"), title=run_id, keys=keys or None)
    if as_json:
        emit({"path": str(path)})
    else:
        click.echo(str(path))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
