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
from tinker_hpc.errors import DataRootError
from tinker_hpc.patience import words_may_be_lost
from tinker_hpc.private_files import check_data_root, check_private, read_json
from tinker_hpc.run_folder import RunFolder


class Supervise:
    """The callable submitit pickles; only a path travels."""

    def __init__(self, run_folder: str) -> None:
        self.run_folder = run_folder

    def __call__(self) -> None:
        words_may_be_lost()
        sys.exit(supervise(RunFolder(Path(self.run_folder)), Place.here()))


def supervise(run_folder: RunFolder, place: Place) -> int:
    """Run this node's part of a job to its end and return the exit code."""
    value = read_json(run_folder.spec)
    if value is None:
        print(f"tinker_hpc: no {run_folder.spec} on {place.hostname}: is the data root on a shared filesystem?")
        return 1
    try:
        check_own(run_folder)
    except DataRootError as error:
        print(f"tinker_hpc: {error}", flush=True)
        return 1
    spec = JobSpec.from_json(value)
    os.environ[process_tree.RUN_ID_VARIABLE] = spec.run_id
    process_tree.adopt_orphans()
    user_umask = os.umask(0o077)  # whatever is made for the run; the loop gets the user's own back
    if place.node_rank == 0:
        node: FirstNode | OtherNode = FirstNode(spec, run_folder, place, user_umask=user_umask)
    else:
        node = OtherNode(spec, run_folder, place)
    try:
        return node.run()
    finally:
        process_tree.end_below(os.getpid(), grace_s=TERM_GRACE_S)


def check_own(run_folder: RunFolder) -> None:
    """Refuse to work with a run folder that somebody else can read or may have written.

    Raises: DataRootError naming what, and the command that closes it.
    """
    folders = [run_folder.slurm, run_folder.logs, run_folder.attempts, run_folder.jobs, run_folder.path / "workers"]
    files = [run_folder.spec, run_folder.payload, run_folder.gateway]
    check_data_root(run_folder.data_root)
    for path in [run_folder.path, *folders, *files]:
        check_private(path)
