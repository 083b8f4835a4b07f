"""Workers for the further base models of a run: jobs of their own, bound to the life of the run.

Both ends are here. The run's first node has their status written (tinker_hpc/worker_watch.py) and ends them when the
run is over. A worker's own first node looks whether its run still lives, for a run that died without a word ends
nobody: a GPU never waits for a loop that is gone.
"""

from __future__ import annotations

import os
import time

from launch import attempts, lineage
from launch.cancel import cancel_run
from launch.children import Child, worker_watch_argv
from launch.monitor import job_statuses
from launch.run_record import listed
from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.patience import until_written
from tinker_hpc.run_folder import RunFolder

_ASK_SLURM_S = 60.0
"""How often a worker asks Slurm whether its run's job lives; a run that ends in order is noticed by its files."""
_ASK_LOCAL_S = 2.0
_UNSUBMITTED_PATIENCE_S = 600.0
"""The workers are submitted before the run itself; a client that died in between never comes back."""


class FurtherWorkers:
    """The run's end, on its first node. Does nothing for a run with one base model."""

    def __init__(self, run_folder: RunFolder) -> None:
        self._run_folder = run_folder
        self._folders = list(run_folder.worker_runs())
        self._watch: Child | None = None

    def step(self) -> None:
        """Keep the process that writes their status alive."""
        if self._folders and (self._watch is None or self._watch.exit_code() is not None):
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            log = self._run_folder.logs / "worker_watch.log"
            self._watch = until_written(lambda: Child("worker_watch", worker_watch_argv(self._run_folder), env, log))

    def end(self, *, deadline: float) -> None:
        """End their jobs: those that run get until `deadline` (monotonic) to go by themselves."""
        for folder in self._folders:
            while attempts.holder(folder) and not listed(folder.outcome) and time.monotonic() < deadline:
                time.sleep(0.1)
        cancel_worker_runs(self._run_folder)


def cancel_worker_runs(run_folder: RunFolder) -> None:
    """End the jobs of a run's further workers, pending or running. What cannot be reached is said, not raised."""
    for folder in run_folder.worker_runs():
        if not lineage.jobs_of(folder) or listed(folder.outcome):
            continue
        try:
            cancel_run(folder)
        except TinkerHpcError as error:
            print(f"tinker_hpc: {error}", flush=True)


class ServedRun:
    """The worker's end: whether the run it serves is over."""

    def __init__(self, worker_run: RunFolder, run_id: str) -> None:
        self._folder = RunFolder(worker_run.path.with_name(run_id))
        self._began = time.monotonic()
        self._next_question = 0.0

    def in_order(self) -> bool:
        """Whether the run has ended and said so; it has then asked its workers to close, too."""
        return listed(self._folder.outcome)

    def gone(self) -> str | None:
        """Why nobody is left to work for, where the run itself has not said so; None while there may be somebody."""
        if not self._folder.path.is_dir():
            return f"run {self._folder.run_id} was never submitted"
        if time.monotonic() < self._next_question:
            return None
        jobs = lineage.jobs_of(self._folder)
        if not jobs:
            self._next_question = time.monotonic() + _ASK_LOCAL_S
            waited = time.monotonic() - self._began > _UNSUBMITTED_PATIENCE_S
            return f"run {self._folder.run_id} never began" if waited and not attempts.holder(self._folder) else None
        self._next_question = time.monotonic() + (_ASK_LOCAL_S if jobs[-1].executor == "local" else _ASK_SLURM_S)
        now = lineage.current(jobs, job_statuses(jobs))
        if now is None or not now.state.finished or self.in_order():
            return None
        return f"job {now.job_id} of run {self._folder.run_id} ended {now.state.value}"
