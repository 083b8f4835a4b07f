"""`scontrol show job` for one finished job: all there is on a cluster without accounting (pure but for the call).

The controller forgets a finished job after MinJobAge (default 300 s).
"""

from __future__ import annotations

import re

from launch.host import Host, LocalHost
from launch.job_state import JobStatus, job_state
from launch.slurm_fields import duration_s, exit_and_signal, gpu_count, node_names, text, unix_time
from tinker_hpc.errors import SlurmUnavailableError

_PAIR = re.compile(r"(?:^|\s)([A-Z][\w/:-]*)=(\S*)")


def query(host: Host, job_id: str) -> tuple[str, JobStatus] | None:
    """Name and status of a job; None if the controller does not know it (any more).

    Raises: SlurmUnavailableError with scontrol's words.
    """
    result = host.run(["scontrol", "show", "job", "--oneliner", job_id])
    if result.ok:
        return parse(result.stdout)
    if "Invalid job id" in result.words:
        return None
    raise SlurmUnavailableError(f"scontrol show job {job_id} failed: {result.words}", command="scontrol")


def why_ending(job_id: str, host: Host | None = None) -> tuple[str | None, float | None]:
    """Who ended the running job `job_id` just now, a `reason` of outcome.json, and for a preempted one when it will be
    killed (unix seconds). None if Slurm does not say.

    For a process that was sent TERM: Slurm gives the same signal for all reasons. Quick or not at all.
    """
    try:
        result = (host or LocalHost()).run(["scontrol", "show", "job", "--oneliner", job_id], timeout_s=2.0)
    except SlurmUnavailableError:
        return None, None
    reason = ending_reason(result.stdout) if result.ok else None
    # From the moment of its preemption a job's EndTime is the end of its grace.
    ends = unix_time(dict(_PAIR.findall(result.stdout)).get("EndTime", "")) if reason == "preempted" else None
    return reason, ends


def kill_wait_s(host: Host) -> float | None:
    """Seconds from Slurm's TERM to its KILL; None if it does not say."""
    try:
        result = host.run(["scontrol", "show", "config"], timeout_s=10.0)
    except SlurmUnavailableError:
        return None
    found = re.search(r"^KillWait\s*=\s*(\d+) sec", result.stdout, re.MULTILINE)
    return float(found[1]) if result.ok and found else None


def end_time(job_id: str, host: Host) -> float | None:
    """When Slurm will end a running job (unix seconds); None if it does not say. Limits may have been changed since."""
    try:
        result = host.run(["scontrol", "show", "job", "--oneliner", job_id], timeout_s=10.0)
    except SlurmUnavailableError:
        return None
    if not result.ok:
        return None
    return unix_time(dict(_PAIR.findall(result.stdout)).get("EndTime", ""))


def ending_reason(output: str) -> str | None:
    """The same from the command's output (pure)."""
    values = dict(_PAIR.findall(output.splitlines()[0])) if output.strip() else {}
    if unix_time(values.get("PreemptTime", "")) is not None:
        return "preempted"
    if values.get("Reason") == "TimeLimit" or values.get("JobState") == "TIMEOUT":
        return "time_limit"
    return "cancelled" if values.get("JobState") in ("CANCELLED", "COMPLETING") else None


def parse(output: str) -> tuple[str, JobStatus] | None:
    """The first job of `scontrol show job --oneliner`. Values with spaces (Command, paths) are cut; none is needed."""
    values = dict(_PAIR.findall(output.splitlines()[0])) if output.strip() else {}
    if "JobId" not in values:
        return None
    state = job_state(values.get("JobState", ""))
    code, signal = exit_and_signal(values.get("ExitCode", ""))
    elapsed_s = duration_s(values.get("RunTime", ""))
    nodes = node_names(values.get("NodeList", ""))
    start = unix_time(values.get("StartTime", "")) if nodes else None
    status = JobStatus(
        job_id=values["JobId"],
        state=state,
        slurm_state=values.get("JobState", ""),
        reason=text(values.get("Reason", "")),
        exit_code=code if state.finished else None,
        signal=signal if state.finished else None,
        nodes=nodes,
        start=start,
        end=unix_time(values.get("EndTime", "")) if state.finished else None,
        elapsed_s=elapsed_s if start is not None else None,
        gpu_hours=None
        if start is None or elapsed_s is None
        else gpu_count(values.get("TRES", "")) * elapsed_s / 3600.0,
    )
    return values.get("JobName", ""), status
