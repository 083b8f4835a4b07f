"""A run's metrics as a picture, one panel a metric, one line a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinker_hpc.errors import ConfigError, DataRootError

DEFAULT_KEYS = ("loss_per_token", "grad_norm")


def plot_metrics(
    rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "", keys: Sequence[str] | None = None
) -> Path:
    """Write a PNG of `rows` (lines of metrics.jsonl) over their optimizer steps.

    Raises: ConfigError if there is nothing to draw; DataRootError if the file cannot be written.
    """
    known = sorted({key for row in rows for key, value in row.items() if isinstance(value, int | float)})
    wanted = keys or [key for key in DEFAULT_KEYS if key in known]
    if not rows:
        raise ConfigError(f"{title or 'the run'} has no metrics yet: there is a line after its first optimizer step.")
    for key in wanted:
        if key not in known:
            raise ConfigError(f"no metric {key!r}; there are {', '.join(known)}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install matplotlib (or tinker_hpc[worker]).") from error
    figure = Figure(figsize=(8, 3 * len(wanted)), layout="constrained")
    FigureCanvasAgg(figure)
    models = list(dict.fromkeys(str(row.get("model_id", "")) for row in rows))
    for panel, key in enumerate(wanted):
        axes = figure.add_subplot(len(wanted), 1, panel + 1)
        for model in models:
            points = [
                (row["step"], row[key])
                for row in rows
                if str(row.get("model_id", "")) == model and row.get(key) is not None
            ]
            axes.plot([x for x, _ in points], [y for _, y in points], label=model, linewidth=1.2)
        axes.set_ylabel(key)
        axes.grid(alpha=0.3)
        if len(models) > 1 and panel == 0:
            axes.legend(fontsize="small")
    figure.axes[0].set_title(title)
    figure.axes[-1].set_xlabel("optimizer step")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataRootError(f"cannot write {path}: {error.strerror}. Choose another --out.", path=str(path)) from error
    return path
