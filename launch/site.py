"""What this cluster lets a job do to be continued, found out by trying: `<data root>/sites/<cluster>.json`.

    chain     a job submits its successor, which waits for its end (`sbatch` works on compute nodes)
    requeue   it does not, but a job may put itself into the queue again (`scontrol requeue`)
    ladder    neither: the client submits several jobs at once, of which one works at a time (`singleton`)

The first job on a cluster tries in this order and writes down what it met; later submissions start from that.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from launch.job_spec import JobSpec
from tinker_hpc.private_files import make_private, read_json, write_json
from tinker_hpc.run_folder import RunFolder

Continuation = Literal["chain", "requeue", "ladder"]

LADDER_RUNGS = 3
"""Jobs submitted behind the first. Sites cap queued jobs, some at 4."""


def continuation(data_root: Path, spec: JobSpec) -> Continuation:
    """How jobs are continued on that cluster, as far as known: a chain until it was refused."""
    value: dict[str, Any] = read_json(_path(data_root, spec.cluster.name)) or {}
    known = value.get("continuation")
    return known if known in ("requeue", "ladder") else "chain"


def learn(run_folder: RunFolder, spec: JobSpec, found: Continuation, words: str) -> None:
    """Write down what a job met. Deleting the file makes the next job try again."""
    path = _path(run_folder.data_root, spec.cluster.name)
    make_private(path.parent)
    write_json(path, {"continuation": found, "words": words, "found_by": spec.run_id, "at": time.time()})


def _path(data_root: Path, cluster: str) -> Path:
    return data_root / "sites" / f"{cluster}.json"
