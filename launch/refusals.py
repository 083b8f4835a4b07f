"""What to change when sbatch says no (pure). Slurm's words are kept; a sentence of advice is added."""

from __future__ import annotations

import enum
import re

from launch.host import CommandResult
from launch.job_spec import JobSpec
from tinker_hpc.errors import SubmissionError

# The request never got to the controller (22.05 says these after 2 to 9 s): surely no job.
_NEVER_ARRIVED = (
    "unable to contact slurm controller (connect failure)",
    "connection refused",
    "munge",  # no credential could be made
    "protocol authentication error",
    "could not establish a configuration source",
    "temporarily unable to accept job",
    "rate limit exceeded",
    "controller in standby mode",
)
# The request went out and no answer came back: there may be a job. A hung controller creates it when it wakes.
_NO_ANSWER = (
    "socket timed out",
    "zero bytes were transmitted or received",
    "unable to contact slurm controller",
    "connection reset",
    "connection timed out",
    "gave no answer within",
)


# Where the same script was accepted on a login node: its partition's AllocNodes (slurm.conf(5); ESLURM_ACCESS_DENIED in
# slurmctld/job_mgr.c), or the words of a site's own plugin or wrapper.
_NOT_FROM_HERE = ("access/permission denied", "login node", "login host", "submit host", "compute node")
# What a site's own plugin refuses for now.
_FOR_NOW = ("limit", "quota", "temporarily", "too many", "maintenance")
# ESLURM_ACCESS_DENIED, ESLURM_DISABLED, ESLURM_NOT_SUPPORTED and a plugin's slurm.ERROR (common/slurm_errno.c). Others
# are about the job (unknown after a crash of the controller, ending already) or the moment.
_NEVER_REQUEUES = (
    "access/permission denied",
    "operation is presently disabled",
    "not supported on this system",
    "unspecified error",
)

_SAID_BY = re.compile(r"^sbatch: ((error|fatal): )?")


class Verdict(enum.Enum):
    """What a failed sbatch leaves us with."""

    REFUSED = "refused"
    """Slurm answered and said no: no job, and something to change."""
    UNREACHED = "unreached"
    """Slurm was not reached: no job, try again later."""
    UNANSWERED = "unanswered"
    """Nobody knows: look for the job before doing anything else."""


def verdict(result: CommandResult) -> Verdict:
    """Read a failed sbatch."""
    if result.ok:
        return Verdict.UNANSWERED  # exit code 0 without a job id
    words = (result.stderr + result.stdout).lower()
    if any(phrase in words for phrase in _NEVER_ARRIVED):
        return Verdict.UNREACHED
    return Verdict.UNANSWERED if any(phrase in words for phrase in _NO_ANSWER) else Verdict.REFUSED


def forbids_submission(words: str) -> bool:
    """Whether a refused sbatch says that this machine may not submit jobs: a property of the site, which stays (pure).

    A job_submit plugin that says no, says "Unspecified error" and before it whatever the site wants to tell. Alone that
    is an error of Slurm's, and all else (a limit, a partition that is drained, a reservation that is over) will pass.
    """
    said = words.lower()
    if any(phrase in said for phrase in _NOT_FROM_HERE):
        return True
    by_plugin = "unspecified error" in said and len(gist(words).split("; ")) > 1
    return by_plugin and not any(word in said for word in _FOR_NOW)


def forbids_requeue(words: str) -> bool:
    """Whether a refused `scontrol update … Requeue=1` says that jobs of this site may not be requeued (pure)."""
    return any(phrase in words.lower() for phrase in _NEVER_REQUEUES)


def explain_refusal(result: CommandResult, spec: JobSpec) -> SubmissionError:
    """The error for a refused submission: what Slurm said, what was asked for, what to do next."""
    return SubmissionError(
        f"Slurm refused run {spec.run_id} on cluster {spec.cluster.name!r}: {gist(result.words)} "
        f"{advice(result.words, spec)} The script: `tinker-hpc run --dry-run …` prints it.",
        slurm_words=result.words,
        run_id=spec.run_id,
    )


def advice(words: str, spec: JobSpec) -> str:
    """The next thing to do, for the commonest refusals of Slurm 22.05 to 25."""
    said = words.lower()
    profile = spec.cluster
    where = f"[clusters.{profile.name}] in the configuration file"
    if "invalid partition" in said:
        return (
            f"Asked for: partition {profile.partition or '(the default)'}. `sinfo -s` lists the partitions; "
            f"set `partition` in {where}."
        )
    if "account" in said and "combination" in said:
        return (
            f"Asked for: account {profile.account or '(your default)'} in partition "
            f"{profile.partition or '(the default)'}. `sacctmgr show assoc user=$USER format=account,partition,qos` "
            f"lists yours; set `account` in {where}."
        )
    if "accounting/qos policy" in said or "qosmax" in said or "assocmax" in said or "assocgrp" in said:
        return (
            "A limit of your account or QOS is reached (number of jobs, size or time). Wait for a job to end, ask "
            f"for less, or set another `qos` or `account` in {where}."
        )
    if "qos" in said:
        return (
            f"Asked for: qos {profile.qos or '(your default)'}. `sacctmgr show assoc user=$USER format=account,qos` "
            f"lists yours; set `qos` in {where}."
        )
    if "time limit" in said or "--time" in said:
        return (
            f"Asked for: {spec.time_limit_min} min. `sinfo -o '%P %l'` shows the longest each partition allows; ask "
            "for less with `time`, or for another partition."
        )
    if "memory specification" in said:
        return (
            f"Asked for: memory {spec.memory_per_node or '(the default)'} per node. `sinfo -o '%P %m'` shows what "
            "nodes have, in MiB; ask for less with `memory`, or leave it out where the site forbids it."
        )
    if "feature" in said:
        return (
            f"Asked for: constraint {profile.constraint}. `sinfo -o '%P %f'` lists the features; set `constraint` "
            f"in {where}."
        )
    if "generic resource" in said or "gres" in said:
        return f"Asked for: {_size(spec)}. `sinfo -o '%P %G'` lists the GPUs; set `gpu_type` in {where}."
    if "node configuration" in said or "node count" in said or "more processors" in said:
        return (
            f"No node of partition {profile.partition or '(the default)'} can ever offer: {_size(spec)}. "
            "`sinfo -o '%P %D %c %m %G'` shows its nodes: count, CPUs, MiB, GPUs."
        )
    if "inactive or drain" in said:
        return f"Partition {profile.partition or '(the default)'} takes no jobs now. `sinfo -s` shows which do."
    if "unrecognized option" in said or "unknown option" in said or "invalid option" in said:
        return f"This Slurm does not know an option of the script. Check `extra` in {where}."
    return f"Asked for: {_size(spec)}. Check the profile {where}."


def _size(spec: JobSpec) -> str:
    parts = [f"{spec.nodes} node{'s' if spec.nodes > 1 else ''}", f"{spec.cpus_per_node} CPUs"]
    if spec.gpus_per_node:
        kind = f"{spec.cluster.gpu_type} " if spec.cluster.gpu_type else ""
        parts.append(f"{spec.gpus_per_node} {kind}GPUs")
    if spec.memory_per_node:
        parts.append(f"memory {spec.memory_per_node}")
    return parts[0] + " with " + ", ".join(parts[1:]) + " each"


def gist(words: str) -> str:
    """Slurm's lines without the repeated "sbatch: error:", as one sentence (pure)."""
    lines = [_SAID_BY.sub("", line).strip() for line in words.splitlines()]
    text = "; ".join(line for line in lines if line)
    return text if text.endswith(".") else text + "."
