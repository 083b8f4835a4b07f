"""Submit a script at most once: a lost answer is looked up, a refusal explained."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from launch.host import CommandResult, Host
from launch.job_spec import JobSpec
from launch.refusals import Verdict, explain_refusal, gist, verdict
from tinker_hpc.errors import SlurmUnavailableError

_LOOKUP_WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0)


def sbatch(spec: JobSpec, script: Path, host: Host, *, options: Sequence[str] = (), known: Sequence[str] = ()) -> str:
    """Submit a script and return the job id.

    Args:
        options: further options of sbatch.
        known: jobs of this run there are already; they have the same name.

    An answer that got lost does not mean a job that got lost: a hung controller creates it when it wakes. So after
    anything but a refusal the job is looked for by its name, and never submitted again from here.

    Raises:
        SubmissionError: refused.
        SlurmUnavailableError: not reached, or no answer and no such job in the queue; `job_may_exist` tells which.
    """
    argv = ["sbatch", "--parsable", *options, str(script)]
    try:
        result = host.run(argv)
    except SlurmUnavailableError as error:
        if not getattr(error, "timed_out", False):
            raise
        result = CommandResult(tuple(argv), 1, "", str(error))
    if result.ok and (match := re.search(r"^(\d+)(;.*)?$", result.stdout, re.MULTILINE)):
        return match.group(1)
    meaning = verdict(result)
    if meaning is Verdict.REFUSED:
        raise explain_refusal(result, spec)
    if meaning is Verdict.UNREACHED:
        raise SlurmUnavailableError(
            f"run {spec.run_id} was not submitted, Slurm cannot be reached: {gist(result.words)} Nothing is in the "
            'queue; submit again when `scontrol ping` says UP, or use cluster "local": this machine, without Slurm.',
            command="sbatch",
            job_may_exist=False,
        )
    found = find_by_name(spec.run_id, host, known)
    if found is not None:
        return found
    raise SlurmUnavailableError(
        f"sbatch gave no job id for run {spec.run_id}: {result.words}. No job of that name is in the queue now. "
        f"`scontrol ping` tells whether Slurm answers; before you submit again, see that "
        f"`squeue --me --name={spec.run_id}` is still empty.",
        command="sbatch",
        job_may_exist=True,
    )


def find_by_name(run_id: str, host: Host, known: Sequence[str] = ()) -> str | None:
    """The id of a job with that name that is not `known` yet; None if Slurm has none within a quarter of a minute."""
    for wait_s in _LOOKUP_WAITS_S:
        time.sleep(wait_s)
        try:
            result = host.run(["squeue", "--me", "-h", "-t", "all", f"--name={run_id}", "-o", "%A"])
        except SlurmUnavailableError:
            continue
        if result.ok and (found := [job_id for job_id in result.stdout.split() if job_id not in known]):
            return found[0]
    return None
