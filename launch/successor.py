"""The job after this one: submitted by this one before it begins to work, and taken back when the run is over.

A successor that waits in the queue already survives whatever ends us without a word: SIGKILL, a lost node, a grace
time of 0 (as NVIDIA's NeMo Gym does it). `--dependency=afternotok` lets it start only if this job ends badly, and
`--kill-on-invalid-dep` removes it where we end well and cannot say so any more.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence

from launch import lineage, site
from launch.host import Host
from launch.job_spec import JobSpec
from launch.sbatch import sbatch
from launch.squeue import live_jobs
from launch.submitted import SubmittedJob
from tinker_hpc.errors import SlurmUnavailableError, SubmissionError
from tinker_hpc.patience import until_written
from tinker_hpc.run_folder import RunFolder

_RETRY_S = 30.0
_RECHECK_S = 300.0
"""A controller that dies within seconds of a submission forgets the job that it acknowledged (Slurm 22.05)."""
_LIMITS = ("limit", "quota", "temporarily", "too many")
"""Words of a refusal that is about now, not about this site."""


class Successor:
    """Sees to it that the run goes on after this job. `step` is called again and again until it is settled.

    Args:
        job_id: this job.
        number: this attempt, for the log.
    """

    def __init__(self, spec: JobSpec, run_folder: RunFolder, host: Host, job_id: str) -> None:
        self._spec = spec
        self._run_folder = run_folder
        self._host = host
        self._job_id = job_id
        self._next_try = 0.0
        self._next_check = time.monotonic() + _RECHECK_S
        self.how: site.Continuation | None = None
        """How it is settled; None while it is not (Slurm does not answer), or cannot be."""
        self.trouble: str | None = None
        """Why there is no successor, in Slurm's words."""
        self.hopeless = False

    def step(self) -> bool:
        """Try, unless it is settled or was tried a moment ago. Returns whether anything became known.

        Where it was settled, look now and then whether the successor is still in the queue.
        """
        if self.how in ("chain", "ladder") and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _RECHECK_S
            if self._waiting(or_running=True) == []:
                self.how = None
        if self.how is not None or self.hopeless or time.monotonic() < self._next_try:
            return False
        self._next_try = time.monotonic() + _RETRY_S
        known = site.continuation(self._run_folder.data_root, self._spec)
        before = (self.how, self.trouble)
        if known == "chain":
            self._chain()
        elif known == "requeue":
            self._allow_requeue("")
        else:
            self._count_rungs()
        return (self.how, self.trouble) != before

    def requeue(self) -> bool:
        """Put this very job into the queue again (it is ended for that). False if Slurm will not."""
        try:
            return self._host.run(["scontrol", "requeue", self._job_id], timeout_s=10.0).ok
        except SlurmUnavailableError:
            return False

    def _chain(self) -> None:
        if self._waiting():
            self.how = "chain"
            return
        try:
            job_id = submit_after(self._spec, self._run_folder, self._host, [f"afternotok:{self._job_id}"])
        except SlurmUnavailableError as error:
            self.trouble = str(error)
            if getattr(error, "missing", False):
                self._allow_requeue(str(error))
        except SubmissionError as error:
            words = str(getattr(error, "slurm_words", error))
            self.trouble = words
            if not any(word in words.lower() for word in _LIMITS):
                self._allow_requeue(words)
        else:
            self.how, self.trouble = "chain", None
            print(f"tinker_hpc: job {job_id} will go on if this one ({self._job_id}) is ended from outside", flush=True)

    def _allow_requeue(self, words: str) -> None:
        """This site refuses sbatch on its compute nodes: let the job be requeued instead."""
        result = self._host.run(["scontrol", "update", f"JobId={self._job_id}", "Requeue=1"], timeout_s=10.0)
        if result.ok:
            self.how, self.trouble = "requeue", None
            if words:
                until_written(lambda: site.learn(self._run_folder, self._spec, "requeue", words))
            return
        said = f"{words} {result.words}".strip()
        until_written(lambda: site.learn(self._run_folder, self._spec, "ladder", said))
        self.trouble, self.hopeless = result.words, not self._waiting()
        self.how = None if self.hopeless else "ladder"

    def _count_rungs(self) -> None:
        if self._waiting():
            self.how = "ladder"
        else:
            self.trouble, self.hopeless = "no rung of the ladder is left: `tinker-hpc resume` adds some", True

    def _waiting(self, *, or_running: bool = False) -> list[str] | None:
        """Other jobs of this run that wait in the queue; None if Slurm does not say."""
        try:
            found = live_jobs(self._spec.run_id, self._host, pending_only=not or_running)
        except SlurmUnavailableError:
            return None
        return [job_id for job_id in found if job_id != self._job_id]


def submit_after(spec: JobSpec, run_folder: RunFolder, host: Host, dependencies: Sequence[str]) -> str:
    """Submit the run's script once more, to start after something. Returns the job id.

    Raises: SubmissionError, SlurmUnavailableError as `executors.sbatch`.
    """
    submitted_at = time.time()
    earlier = lineage.jobs_of(run_folder)
    job_id = sbatch(
        spec,
        run_folder.slurm / "job.sbatch",
        host,
        options=(f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"),
        known=[job.job_id for job in earlier],
    )
    # The job is in the queue: it needs its pickle, and the run must know it.
    until_written(lambda: give_pickle(run_folder, earlier[0].job_id, job_id))
    job = SubmittedJob(
        job_id=job_id,
        cluster=spec.cluster.name,
        submitted_at=submitted_at,
        run_id=spec.run_id,
        executor="slurm",
        run_folder=str(run_folder.path),
    )
    until_written(lambda: lineage.remember(run_folder, job))
    return job_id


def give_pickle(run_folder: RunFolder, first: str, job_id: str) -> None:
    """submitit's entry point waits for a pickle of the job's own id: the same supervisor, which knows only a path."""
    temporary = run_folder.slurm / f".{job_id}_submitted.pkl"
    shutil.copyfile(run_folder.slurm / f"{first}_submitted.pkl", temporary)
    os.replace(temporary, run_folder.slurm / f"{job_id}_submitted.pkl")


def take_back(run_folder: RunFolder, host: Host, *, own_job_id: str, run_id: str) -> None:
    """Remove the jobs that wait for this one: the run is over. What fails here ends by itself when it starts."""
    try:
        waiting = [job_id for job_id in live_jobs(run_id, host, pending_only=True) if job_id != own_job_id]
        if waiting:
            host.run(["scancel", f"--jobname={run_id}", "--state=PENDING", *waiting], timeout_s=15.0)
    except SlurmUnavailableError as error:
        print(f"tinker_hpc: the run is over, but the job after this one could not be removed: {error}", flush=True)
