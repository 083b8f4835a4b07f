"""State of a job of the local executor: a process, and what its supervisor left in the run folder.

submitit's own answer is not used: it knows only jobs started by this very Python process.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from launch import attempts, process_tree
from launch.job_state import OUTCOME_STATES, JobState, JobStatus
from launch.submitted import SubmittedJob
from tinker_hpc.private_files import read_json
from tinker_hpc.run_folder import RunFolder


def status(job: SubmittedJob) -> JobStatus:
    """The state of a local job, from the process table and its own files."""
    host = job.host or ""
    if host != process_tree.this_host():
        return JobStatus(
            job.job_id,
            JobState.UNKNOWN,
            reason=f"a local job on {host}; its processes can only be seen there",
            nodes=(host,),
        )
    _reap()
    alive = process_tree.is_alive(process_tree.ProcessIdentity(int(job.job_id), job.process_start or 0, host))
    folder = RunFolder(Path(job.run_folder))
    return combine(
        job,
        alive=alive,
        outcome=read_json(folder.outcome),
        claim=attempts.newest_claim(folder),
        cancel_requested=folder.cancel.exists(),
        now=time.time(),
    )


def combine(
    job: SubmittedJob,
    *,
    alive: bool,
    outcome: dict[str, Any] | None,
    claim: dict[str, Any] | None,
    cancel_requested: bool,
    now: float,
) -> JobStatus:
    """One status from what was seen (pure)."""
    start = claim.get("claimed_at") if claim else None
    nodes = (job.host,) if job.host else ()
    if alive:
        word = "RUNNING" if outcome is None else "COMPLETING"
        elapsed_s = None if start is None else now - start
        return JobStatus(job.job_id, JobState.RUNNING, word, nodes=nodes, start=start, elapsed_s=elapsed_s)
    if outcome is None:
        state = JobState.CANCELLED if cancel_requested else JobState.FAILED
        reason = "cancelled on request" if cancel_requested else "its process is gone and left no outcome"
        return JobStatus(job.job_id, state, state.value, reason=reason, nodes=nodes, start=start)
    ended_at = outcome.get("ended_at")
    state = JobState.COMPLETED if outcome.get("state") == "succeeded" else JobState.FAILED
    state = OUTCOME_STATES.get(str(outcome.get("reason")), state)
    return JobStatus(
        job.job_id,
        state,
        state.value,
        reason=str(outcome.get("error") or ""),
        exit_code=outcome.get("exit_code"),
        nodes=nodes,
        start=start,
        end=ended_at,
        elapsed_s=None if start is None or ended_at is None else ended_at - start,
    )


def _reap() -> None:
    """Collect finished controllers of this client, if it ever started one; if not, submitit stays unloaded."""
    if (executors := sys.modules.get("launch.executors")) is not None:
        executors.reap_local()
