"""What is kept of a submitted job: `submitted.json`."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

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
        """The job of a run; None if it was never (completely) submitted. Raises: DataRootError as `read`."""
        return cls.read(run_folder.submitted, run_folder)

    @classmethod
    def read(cls, path: Path, run_folder: RunFolder) -> SubmittedJob | None:
        """The job in a file of the run's; None while there is none. Raises: DataRootError if the file is damaged."""
        value = run_folder.read(path)
        if value is None:
            return None
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in value]:
            raise run_folder.unreadable(path, ValueError(f"it has no {', '.join(missing)}"))
        return cls.from_json(value)
