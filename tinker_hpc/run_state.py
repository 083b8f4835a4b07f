"""How a run is doing: its own files first, then what Slurm says.

Own files cost nothing and are never wrong about what they say: an outcome is the end of the loop, whatever the queue
shows. What they cannot say (still queued? killed at the time limit?) is asked of Slurm, for all runs in one call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from launch import lineage
from launch.job_state import OUTCOME_STATES, JobState, JobStatus
from tinker_hpc.errors import DataRootError
from tinker_hpc.run_folder import RunFolder


@dataclass(frozen=True)
class OwnFiles:
    """What a run folder says by itself."""

    spec: Mapping[str, Any]
    submitted: Mapping[str, Any] | None
    outcome: Mapping[str, Any] | None
    worker_status: Mapping[str, Any] | None
    cancel_requested: bool
    has_result: bool
    job_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. None is "not known", never zero; times are unix seconds."""

    id: str
    kind: str
    name: str
    base_model: str
    cluster: str
    state: JobState
    slurm_state: str = ""
    """Slurm's own words; empty while only our files were read."""
    reason: str = ""
    """Why it waits, or how it ended."""
    phase: str = ""
    """Of its worker: queued, starting, ready, ended."""
    phase_since: float | None = None
    job_id: str | None = None
    """Of the job that works on it now, or did last."""
    job_ids: tuple[str, ...] = ()
    """Of all its jobs, in the order they were submitted."""
    created_at: float | None = None
    start: float | None = None
    end: float | None = None
    elapsed_s: float | None = None
    estimated_start: float | None = None
    nodes: tuple[str, ...] = ()
    exit_code: int | None = None
    """Of the loop where it is known, else of the job."""
    gpu_hours: float | None = None
    peak_memory_gib: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the loop is over; its job may still be tidying up."""
        return self.state.finished

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "state": self.state.value,
            "nodes": list(self.nodes),
            "job_ids": list(self.job_ids),
            "finished": self.finished,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunStatus:
        """The status `to_json` was made of."""
        known = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        return cls(
            **{
                **known,
                "state": JobState(value["state"]),
                "nodes": tuple(value.get("nodes", ())),
                "job_ids": tuple(value.get("job_ids", ())),
            }
        )


def read_own_files(folder: RunFolder) -> OwnFiles:
    """Read what a run folder says now.

    The folder is listed afresh and only files in the list are opened: asking NFS for a name that does not exist yet
    makes it remember "no such file" for up to a minute.
    Raises: DataRootError naming what cannot be read.
    """
    try:
        names = set(os.listdir(folder.path))
    except OSError as error:
        raise folder.unreadable(folder.path, error) from error

    def read(name: str) -> dict[str, Any] | None:
        return folder.read(folder.path / name) if name in names else None

    worker = folder.worker(0)
    try:
        has_status = worker.status.name in os.listdir(worker.path)
    except FileNotFoundError:
        has_status = False
    except OSError as error:
        raise folder.unreadable(worker.path, error) from error
    return OwnFiles(
        spec=read("run.json") or {},
        submitted=read("submitted.json"),
        outcome=read("outcome.json"),
        worker_status=folder.read(worker.status) if has_status else None,
        cancel_requested="cancel.json" in names,
        has_result="result.pkl" in names,
        job_ids=tuple(job.job_id for job in lineage.jobs_of(folder)) if "submitted.json" in names else (),
    )


def combine(run_id: str, own: OwnFiles, job: JobStatus | None) -> RunStatus:
    """One status from both sources (pure).

    A loop that succeeded has succeeded, whatever became of its job. A loop that failed may have failed because its
    job was killed: then the job's state is the reason worth showing.
    """
    outcome = own.outcome or {}
    state = job.state if job else JobState.PENDING if own.submitted else JobState.UNKNOWN
    reason = job.reason if job else ""
    if outcome.get("state") == "succeeded":
        state, reason = JobState.COMPLETED, ""
    elif outcome.get("state") == "failed" and not (job and job.state.finished and job.state not in _LOOP_ENDS):
        state = OUTCOME_STATES.get(str(outcome.get("reason")), JobState.FAILED)
        reason = str(outcome.get("error") or reason)
    elif own.worker_status and not reason and not state.finished:
        started = own.worker_status.get("phase") in ("starting", "ready")
        state = JobState.RUNNING if job is None and started else state
        reason = str(own.worker_status.get("reason") or "")
    if own.has_result and not state.finished:
        reason = "the loop is over, its job is ending"
    cluster = own.spec.get("cluster")
    exit_code = outcome.get("exit_code")
    return RunStatus(
        id=run_id,
        kind=str(own.spec.get("kind", "run")),
        name=str(own.spec.get("name", "")),
        base_model=str(own.spec.get("base_model", "")),
        cluster=str(cluster.get("name", "") if isinstance(cluster, Mapping) else cluster or ""),
        state=state,
        slurm_state=job.slurm_state if job else "",
        reason=reason,
        phase=str((own.worker_status or {}).get("phase", "")),
        phase_since=(own.worker_status or {}).get("since"),
        job_id=job.job_id if job else own.job_ids[-1] if own.job_ids else None,
        job_ids=own.job_ids,
        created_at=own.spec.get("created_at") or (own.submitted or {}).get("submitted_at"),
        start=job.start if job else None,
        end=(job.end if job else None) or outcome.get("ended_at"),
        elapsed_s=job.elapsed_s if job else None,
        estimated_start=job.estimated_start if job else None,
        nodes=job.nodes if job else (),
        exit_code=exit_code if exit_code is not None else job.exit_code if job else None,
        gpu_hours=0.0 if own.spec.get("gpus_per_node") == 0 else job.gpu_hours if job else None,
        peak_memory_gib=job.peak_memory_gib if job else None,
    )


# Ends of a job that say no more than the loop's own outcome does.
_LOOP_ENDS = (JobState.COMPLETED, JobState.FAILED, JobState.LOST)


def read_events(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's history, oldest first. A line still being written is left for the next call."""
    return read_json_lines(folder.path, "events.jsonl")


def read_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """A line per optimizer step, from every worker of the run, in the order written."""
    return [row for worker in folder.workers() for row in read_json_lines(worker.path, "metrics.jsonl")]


def read_json_lines(folder: Any, name: str) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file that one other process appends to; [] while there is none.

    Raises: DataRootError if it cannot be read.
    """
    try:
        if name not in os.listdir(folder):
            return []
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataRootError(
            f"cannot read {folder / name}: {error.strerror}. Check its permissions, then try again.", path=str(folder)
        ) from error
    rows: list[dict[str, Any]] = []
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line torn by a crash of its writer
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
