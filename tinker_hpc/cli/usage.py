"""`usage`: GPU-hours, as accounting counted them."""

from __future__ import annotations

from collections import defaultdict

import click

from tinker_hpc.cli.options import json_option
from tinker_hpc.cli.output import emit, table


@click.command()
@json_option
def usage(as_json: bool) -> None:
    """Sum up GPU-hours by cluster."""
    from tinker_hpc.cli.states import current_statuses
    from tinker_hpc.config import load_config

    sums: dict[str, dict[str, float]] = defaultdict(lambda: {"num_runs": 0, "gpu_hours": 0.0, "num_unknown": 0})
    for status in current_statuses(load_config()):
        cluster = sums[status.cluster]
        cluster["num_runs"] += 1
        cluster["gpu_hours"] += status.gpu_hours or 0.0
        cluster["num_unknown"] += status.gpu_hours is None
    if as_json:
        emit(sums)
        return
    table(
        ("CLUSTER", "RUNS", "GPU-HOURS", "NOT KNOWN"),
        [
            (name, str(s["num_runs"]), f"{s['gpu_hours']:.2f}", str(s["num_unknown"]))
            for name, s in sorted(sums.items())
        ],
    )
