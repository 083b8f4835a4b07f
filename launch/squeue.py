"""One `squeue` for all of the user's jobs, and its rows (pure but for the call).

`--json` is not used: Slurm 22.05 then ignores every filter, and prints an empty list with exit code 0 when the
controller is down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.host import Host
from launch.job_state import JobState, JobStatus, job_state
from launch.slurm_fields import duration_s, node_names, text, unix_time
from tinker_hpc.errors import SlurmUnavailableError

# id, name, state, reason, submitted, start (expected start while pending), end, elapsed, node list
_FORMAT = "%i|%j|%T|%r|%V|%S|%e|%M|%N"
_NUM_FIELDS = 9
ARGV = ("squeue", "--me", "--noheader", "--states=all", f"--format={_FORMAT}")


@dataclass(frozen=True)
class QueueRow:
    """A job in the queue, or finished less than the cluster's MinJobAge (default 300 s) ago."""

    job_id: str
    name: str
    submitted: float | None
    status: JobStatus


def query(host: Host) -> list[QueueRow]:
    """All jobs of this user that the controller still knows. One call, whatever their number.

    Raises: SlurmUnavailableError with squeue's words.
    """
    result = host.run(ARGV)
    if not result.ok:
        raise SlurmUnavailableError(
            f"squeue failed: {result.words} The jobs themselves are not affected; `scontrol ping` tells whether the "
            "controller is back.",
            command="squeue",
        )
    return parse(result.stdout)


def live_jobs(run_id: str, host: Host, *, pending_only: bool = False) -> list[str]:
    """Ids of the run's jobs that are in the queue, from one squeue; with `pending_only` those that wait there."""
    rows = [row for row in query(host) if row.name == run_id and not row.status.state.finished]
    if pending_only:
        rows = [row for row in rows if row.status.slurm_state == "PENDING"]
    return [row.job_id for row in rows]


def parse(output: str) -> list[QueueRow]:
    """Rows of `squeue` with our format. A line of another shape (a site's banner) is no row."""
    rows = (line.split("|") for line in output.splitlines())
    return [_row(fields) for fields in rows if len(fields) == _NUM_FIELDS]


def _row(fields: Sequence[str]) -> QueueRow:
    job_id, name, slurm_state, reason, submitted, start, end, elapsed, nodes = (field.strip() for field in fields)
    state = job_state(slurm_state)
    started = state not in (JobState.PENDING, JobState.UNKNOWN)
    return QueueRow(
        job_id=job_id,
        name=name,
        submitted=unix_time(submitted),
        status=JobStatus(
            job_id=job_id,
            state=state,
            slurm_state=slurm_state,
            reason=text(reason),
            nodes=node_names(nodes),
            start=unix_time(start) if started and nodes else None,
            end=unix_time(end) if state.finished else None,
            elapsed_s=duration_s(elapsed) if started else None,
            estimated_start=unix_time(start) if state is JobState.PENDING else None,
        ),
    )
