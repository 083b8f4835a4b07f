"""submitit's two executors with what a cluster taught us (submitit 1.5.4).

Kept from submitit: pickling, the entry point on the node, the file names. Replaced: the script's text (a template),
the call of sbatch (a lost answer is looked up, a refusal explained), and how a local job is detached.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from launch import process_tree
from launch.host import Host
from launch.job_spec import JobSpec
from launch.render import python_of, sbatch_text
from launch.sbatch import sbatch

_STARTED: list[subprocess.Popen[bytes]] = []
"""Controllers of this client: kept so that a finished one is reaped, and never waited for."""


class SlurmJobExecutor(SlurmExecutor):
    """submitit for Slurm, with our script and a submission that happens at most once."""

    def __init__(self, spec: JobSpec, slurm_folder: Path, host: Host, *, requeue: bool = False) -> None:
        # Not SlurmExecutor's own __init__: it looks for srun here, but the commands run on `host`.
        super(SlurmExecutor, self).__init__(slurm_folder)
        self.python = python_of(spec)
        self.spec = spec
        self.host = host
        self.requeue = requeue
        self.parameters = {"nodes": spec.nodes, "ntasks_per_node": 1, "time": spec.time_limit_min}

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return sbatch_text(self.spec, command, self.folder, requeue=self.requeue)

    def _submit_command(self, command: str) -> SlurmJob[Any]:
        script = self.folder / "job.sbatch"
        script.write_text(self._make_submission_file_text(command, uid=""))
        job_id = sbatch(self.spec, script, self.host)
        return SlurmJob(folder=self.folder, job_id=job_id, tasks=list(range(self.spec.nodes)))


class LocalJobExecutor(LocalExecutor):
    """submitit's local processes, detached from the client for good.

    submitit leaves the controller in the client's session (Ctrl-C and a closed terminal reach it), lets it inherit
    the client's output (a pipe that never closes) and overwrites CUDA_VISIBLE_DEVICES counting from 0.
    """

    def __init__(self, spec: JobSpec, slurm_folder: Path) -> None:
        super().__init__(slurm_folder, python=python_of(spec))
        self.spec = spec
        self.parameters = {"timeout_min": spec.time_limit_min}

    def _submit_command(self, command: str) -> LocalJob[Any]:
        if self.spec.cluster.setup:
            script = "\n".join(["set -e", *self.spec.cluster.setup, "set +e", f"exec {command}"])
            command = shlex.join(["bash", "-c", script])
        with (self.folder / "controller.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "submitit.local._local", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=local_environment(self.spec, command, os.environ),
            )
        _STARTED.append(process)
        return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=[0])


def reap_local() -> None:
    """Collect the exit codes of finished controllers of this client."""
    _STARTED[:] = [process for process in _STARTED if process.poll() is None]


def local_environment(spec: JobSpec, command: str, environ: Any) -> dict[str, str]:
    """Environment of a local job's controller (pure)."""
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = visible or [str(index) for index in range(spec.gpus_per_node)]
    return {
        **environ,
        "HF_HUB_OFFLINE": environ.get("HF_HUB_OFFLINE", "1"),
        **spec.variables,
        process_tree.RUN_ID_VARIABLE: spec.run_id,
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": "1",
        "SUBMITIT_LOCAL_COMMAND": command,
        # The supervisor ends a local job at its limit and says so; submitit's own limit, which kills after a second,
        # is only for a supervisor that hangs.
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * spec.time_limit_min + 60),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_STDERR_TO_STDOUT": "",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "CUDA_VISIBLE_DEVICES": ",".join(devices[: spec.gpus_per_node]),
    }
