"""Slurm's reasons why a job waits, in words (pure). Source: `man squeue`, "JOB REASON CODES", 22.05 to 25.05; all of
their names are in Slurm's src/common/job_state_reason.c."""

from __future__ import annotations

import re

_WORDS = {
    "Priority": "jobs of higher priority go first",
    "Resources": "it is next; the nodes it needs are busy",
    "Dependency": "it starts when the job before it has ended",
    "DependencyNeverSatisfied": "the job before it ended well; Slurm removes it",
    "BeginTime": "its start time is not reached; a requeued job waits two minutes",
    "JobHeldUser": "held; `scontrol release {job_id}` lets it go",
    "JobHeldAdmin": "held by an administrator, who can release it",
    "ReqNodeNotAvail": "nodes it needs are down, drained or reserved",
    "NodeDown": "a node it needs is down",
    "Reservation": "its reservation has not begun",
    "PartitionDown": "its partition starts no jobs now",
    "PartitionInactive": "its partition is switched off",
    "PartitionNodeLimit": "more nodes than its partition allows: it will not start as it is",
    "PartitionTimeLimit": "more time than its partition allows: it will not start as it is",
    "Licenses": "it waits for a license",
}
_OF_ONE_JOB = re.compile(r"(QOS|Assoc)Max\w+Per(Job|Node)(Limit)?")
"""Limits of a job by itself, whatever else runs."""
_LEAST = re.compile(r"QOSMin\w+")
_LIMITS = re.compile(r"(QOS|Assoc)\w*(Limit|Jobs|Cpu|GRES|Mem|Node|Wall|Resource)\w*")


def in_words(reason: str, job_id: str | None) -> str:
    """What Slurm's reason means to whoever waits; "" for one this table does not know."""
    first = re.split(r"[^A-Za-z0-9]", reason, maxsplit=1)[0]
    if first in _WORDS:
        return _WORDS[first].format(job_id=job_id or "ID")
    whose = "QOS" if first.startswith("QOS") else "account"
    if _OF_ONE_JOB.fullmatch(first):
        return (
            f"more time, GPUs, nodes, CPUs or memory than your {whose} allows one job: it will not start as it is; "
            "cancel it and ask for less"
        )
    if _LEAST.fullmatch(first):
        return (
            "less than your QOS asks of a job: it will not start as it is; cancel it and ask for more, or set another "
            "`qos`"
        )
    if _LIMITS.fullmatch(first):
        return f"a limit of your {whose} is reached; it starts when other jobs of it end"
    return ""
