"""What runs once per node inside a job, whatever started the job: it starts the rest, watches it, and ends it.

    first node of a run      gateway, torch's elastic agent (the node's ranks), the user's loop
    first node of a session  the agent
    every other node         the agent

The loop starts when the gateway answers; nobody waits for the worker, the SDK does that. The job's exit code is the
loop's. A supervisor deletes nothing, leaves no process behind, and never leaves the loop waiting for something that
will not come: a gateway that dies is started again, a worker that is gone for good is declared `ended`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch import process_tree
from launch.first_node import TERM_GRACE_S, FirstNode
from launch.job_spec import JobSpec
from launch.node import OtherNode, Place
from tinker_hpc.run_folder import RunFolder, read_json


class Supervise:
    """The callable submitit pickles; only a path travels."""

    def __init__(self, run_folder: str) -> None:
        self.run_folder = run_folder

    def __call__(self) -> None:
        sys.exit(supervise(RunFolder(Path(self.run_folder)), Place.here()))


def supervise(run_folder: RunFolder, place: Place) -> int:
    """Run this node's part of a job to its end and return the exit code."""
    value = read_json(run_folder.spec)
    if value is None:
        print(f"tinker_hpc: no {run_folder.spec} on {place.hostname}: is the data root on a shared filesystem?")
        return 1
    spec = JobSpec.from_json(value)
    os.environ[process_tree.RUN_ID_VARIABLE] = spec.run_id
    process_tree.adopt_orphans()
    node = FirstNode(spec, run_folder, place) if place.node_rank == 0 else OtherNode(spec, run_folder, place)
    try:
        return node.run()
    finally:
        process_tree.end_below(os.getpid(), grace_s=TERM_GRACE_S)
