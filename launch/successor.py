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
from launch.host import CommandResult, Host
from launch.job_spec import JobSpec
from launch.refusals import Verdict, forbids_requeue, forbids_submission, gist, verdict
from launch.sbatch import sbatch
from launch.squeue import live_jobs
from launch.submitted import SubmittedJob
from tinker_hpc.errors import SlurmUnavailableError, SubmissionError
from tinker_hpc.patience import until_written
from tinker_hpc.run_folder import RunFolder

_RETRY_S = 30.0
_RECHECK_S = 300.0
"""A controller that dies within seconds of a submission forgets the job that it acknowledged (Slurm 22.05)."""


class Successor:
    """Sees to it that the run goes on after this job. `step` is called again and again until it is settled.

    Slurm that does not answer is no news: nothing is concluded from it, nothing learned, and it is asked again.

    Args:
        job_id: this job.
    """

    def __init__(self, spec: JobSpec, run_folder: RunFolder, host: Host, job_id: str) -> None:
        self._spec = spec
        self._run_folder = run_folder
        self._host = host
        self._job_id = job_id
        self._next_try = 0.0
        self._pause_s = _RETRY_S
        self._is_stopgap = False
        """This job may be requeued only because Slurm takes no successor now."""
        self.how: site.Continuation | None = None
        """How it is settled; None while it is not (Slurm does not answer), or cannot be."""
        self.trouble: str | None = None
        """Why there is no successor, in Slurm's words."""

    def step(self) -> bool:
        """Try, unless it is settled or was tried a moment ago. Returns whether anything became known.

        Where it was settled, look now and then whether the successor is still in the queue, or can be by now.
        """
        if time.monotonic() < self._next_try:
            return False
        before = (self.how, self.trouble)
        try:
            if self._is_gone():
                self.how, before = None, (None, None)
            if self.how is None or self._is_stopgap:
                self._settle()
            if self._is_stopgap and self.how != "requeue":
                self._is_stopgap = False
                self._set_requeue(False)
        except SlurmUnavailableError as error:
            if self.how is None:
                self.trouble, self._pause_s = str(error), _RETRY_S
        now = time.monotonic()
        if self.how is not None:
            self.trouble, self._next_try, self._pause_s = None, now + _RECHECK_S, _RETRY_S
        else:  # a refusal will mostly be the same one in half a minute: less and less often
            self._next_try, self._pause_s = now + self._pause_s, min(2 * self._pause_s, _RECHECK_S)
        return (self.how, self.trouble) != before

    def requeue(self) -> bool:
        """Put this very job into the queue again (it is ended for that). False if Slurm will not."""
        try:
            return self._host.run(["scontrol", "requeue", self._job_id], timeout_s=10.0).ok
        except SlurmUnavailableError:
            return False

    def _is_gone(self) -> bool:
        """Whether a successor that was in the queue is there no more."""
        return self.how in ("chain", "ladder") and not self._others(or_running=True)

    def _settle(self) -> None:
        """Raises: SlurmUnavailableError for no answer."""
        known = site.continuation(self._run_folder.data_root, self._spec)
        if known == "chain":
            self._chain()
        elif known == "requeue":
            self._allow_requeue("", forbidden=True)
        else:
            self._count_rungs("")

    def _chain(self) -> None:
        if found := self._others():
            known = [job.job_id for job in lineage.jobs_of(self._run_folder)]
            for job_id in found:
                if job_id not in known:  # its sbatch was never answered: a hung controller made it when it woke
                    take_in(self._spec, self._run_folder, job_id, submitted_at=time.time())
            self.how = "chain"
            return
        try:
            job_id = submit_after(self._spec, self._run_folder, self._host, [f"afternotok:{self._job_id}"])
        except SlurmUnavailableError as error:
            if not getattr(error, "missing", False):
                raise
            self._allow_requeue(str(error), forbidden=True)
        except SubmissionError as error:
            words = str(getattr(error, "slurm_words", error))
            self._allow_requeue(words, forbidden=forbids_submission(words))
        else:
            self.how = "chain"
            print(f"tinker_hpc: job {job_id} will go on if this one ({self._job_id}) is ended from outside", flush=True)

    def _allow_requeue(self, words: str, *, forbidden: bool) -> None:
        """There is no successor: let this very job be requeued instead.

        Args:
            words: why; "" where that is known of the site.
            forbidden: sbatch is refused on this site's compute nodes, which is worth knowing. Else it is refused now (a
                limit, a partition that is drained) and tried again: nothing is learned.

        Raises: SlurmUnavailableError for no answer.
        """
        try:
            result = self._set_requeue(True)
        except SlurmUnavailableError as error:
            if not getattr(error, "missing", False):
                raise
            refusal, for_good = str(error), True
        else:
            if result.ok:
                if self.how is None and not forbidden:
                    print(
                        f"tinker_hpc: this job may be requeued; no other can follow it now: {gist(words)}", flush=True
                    )
                self.how, self._is_stopgap = "requeue", not forbidden
                if forbidden and words:
                    until_written(lambda: site.learn(self._run_folder, self._spec, "requeue", words))
                return
            if verdict(result) is not Verdict.REFUSED:
                raise SlurmUnavailableError(f"scontrol update failed: {result.words}", command="scontrol")
            refusal, for_good = result.words, forbids_requeue(result.words)
        if forbidden and for_good:
            said = f"{words} {refusal}".strip()
            until_written(lambda: site.learn(self._run_folder, self._spec, "ladder", said))
            self._count_rungs(refusal)
        else:
            self.trouble = f"{words} {refusal}".strip()

    def _set_requeue(self, may: bool) -> CommandResult:
        return self._host.run(["scontrol", "update", f"JobId={self._job_id}", f"Requeue={may:d}"], timeout_s=10.0)

    def _count_rungs(self, refusal: str) -> None:
        if self._others():
            self.how = "ladder"
        else:
            none_left = "no rung of the ladder is left: `tinker-hpc resume` adds some"
            self.trouble = f"{refusal}; {none_left}" if refusal else none_left

    def _others(self, *, or_running: bool = False) -> list[str]:
        """Other jobs of this run that wait in the queue. Where there is no squeue: those submitted after this one.

        Raises: SlurmUnavailableError if Slurm does not say.
        """
        try:
            found = live_jobs(self._spec.run_id, self._host, pending_only=not or_running)
        except SlurmUnavailableError as error:
            if not getattr(error, "missing", False):
                raise
            found = [job.job_id for job in lineage.jobs_of(self._run_folder)]
            found = found[found.index(self._job_id) :] if self._job_id in found else []
        return [job_id for job_id in found if job_id != self._job_id]


def submit_after(spec: JobSpec, run_folder: RunFolder, host: Host, dependencies: Sequence[str]) -> str:
    """Submit the run's script once more, to start after something. Returns the job id.

    Raises: SubmissionError, SlurmUnavailableError as `executors.sbatch`.
    """
    submitted_at = time.time()
    job_id = sbatch(
        spec,
        run_folder.slurm / "job.sbatch",
        host,
        options=(f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"),
        known=[job.job_id for job in lineage.jobs_of(run_folder)],
    )
    take_in(spec, run_folder, job_id, submitted_at=submitted_at)
    return job_id


def take_in(spec: JobSpec, run_folder: RunFolder, job_id: str, *, submitted_at: float) -> None:
    """A job of the run is in the queue: it needs its pickle, and the run must know it."""
    first = lineage.jobs_of(run_folder)[0]
    until_written(lambda: give_pickle(run_folder, first.job_id, job_id))
    job = SubmittedJob(
        job_id=job_id,
        cluster=spec.cluster.name,
        submitted_at=submitted_at,
        run_id=spec.run_id,
        executor="slurm",
        run_folder=str(run_folder.path),
    )
    until_written(lambda: lineage.remember(run_folder, job))


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
