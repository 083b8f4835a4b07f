"""What is kept of a submitted job: `submitted.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tinker_hpc.private_files import read_json
from tinker_hpc.run_folder import RunFolder


@dataclass(frozen=True)
class SubmittedJob:
    """A job that was accepted: enough to find it again, also where its id was given to another job since."""

    job_id: str
    """Slurm's job id; for a local job the process id of its controller."""
    cluster: str
    submitted_at: float
    """Unix seconds, just before submission, by the client's clock."""
    run_id: str
    """The job's name in Slurm: a row with this id and another name is not our job."""
    executor: Literal["slurm", "local"]
    run_folder: str
    host: str | None = None
    """Local jobs: the machine its process is on."""
    process_start: int | None = None
    """Local jobs: the process's start, in clock ticks since boot; another start is another process."""

    def to_json(self) -> dict[str, Any]:
        """`submitted.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SubmittedJob:
        """The job in `submitted.json`."""
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value})

    @classmethod
    def of(cls, run_folder: RunFolder) -> SubmittedJob | None:
        """The job of a run; None if it was never (completely) submitted."""
        value = read_json(run_folder.submitted)
        return None if value is None else cls.from_json(value)
