"""What accounting remembers of finished jobs: exit code, times, GPU-hours, peak memory (pure but for the call).

Traps of Slurm 22.05, all met on a real one: `--json` says exit code 0 for every failed job; ExitCode is masked with
0x7f (128 shows as 0); a requeued or reused id has several records, shown only with --duplicates; a job lost by a
crashed controller stays PENDING or RUNNING here for ever; the default time window hides old jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.host import CommandResult, Host
from launch.job_state import JobState, JobStatus, job_state
from launch.slurm_fields import exit_and_signal, gpu_count, memory_bytes, node_names, text, unix_time
from tinker_hpc.errors import SlurmUnavailableError

_COLUMNS = (
    "JobIDRaw",
    "JobName",
    "State",
    "ExitCode",
    "Submit",
    "Start",
    "End",
    "ElapsedRaw",
    "NodeList",
    "AllocTRES",
    "MaxRSS",
    "Reason",
)
_WINDOW_S = 86_400
"""How far before the submission the window begins: the client's clock may be wrong, or in another time zone."""


@dataclass(frozen=True)
class AccountingRow:
    """One record of one job: an id has several if it was requeued, or given to another job."""

    job_id: str
    name: str
    submitted: float | None
    status: JobStatus


def argv(job_ids: Sequence[str], *, submitted_since: float) -> list[str]:
    """The command for some jobs, the oldest of which was submitted at that unix time (pure)."""
    start = max(1, int(submitted_since) - _WINDOW_S)
    return [
        "sacct",
        "--noheader",
        "--parsable2",
        "--duplicates",
        f"--starttime=uts{start}",
        f"--jobs={','.join(job_ids)}",
        f"--format={','.join(_COLUMNS)}",
    ]


def query(host: Host, job_ids: Sequence[str], *, submitted_since: float) -> list[AccountingRow] | None:
    """Records of these jobs; None on a cluster that keeps no accounting.

    Raises: SlurmUnavailableError with sacct's words if the accounting database cannot be reached now.
    """
    result = host.run(argv(job_ids, submitted_since=submitted_since))
    if result.ok:
        return parse(result.stdout)
    if no_accounting(result):
        return None
    raise SlurmUnavailableError(f"sacct failed: {result.words}", command="sacct")


def no_accounting(result: CommandResult) -> bool:
    """Whether sacct says that there is nothing to ask, now or later (pure)."""
    said = (result.stderr + result.stdout).lower()
    return "accounting storage is disabled" in said


def parse(output: str) -> list[AccountingRow]:
    """Records of `sacct` with our columns, newest submission last; steps are folded into their job."""
    records: list[tuple[list[str], list[list[str]]]] = []  # a job's fields, and its steps'
    newest: dict[str, list[list[str]]] = {}  # steps of the last record of an id: those that follow belong to it
    for line in output.splitlines():
        fields = line.split("|")
        if len(fields) != len(_COLUMNS):
            continue
        job_id, _, step = fields[0].partition(".")
        if not step:
            newest[job_id] = []
            records.append((fields, newest[job_id]))
        elif job_id in newest:
            newest[job_id].append(fields)
    return sorted((_row(fields, steps) for fields, steps in records), key=lambda row: row.submitted or 0.0)


def _row(fields: Sequence[str], steps: Sequence[Sequence[str]]) -> AccountingRow:
    job_id, name, slurm_state, exit_code, submitted, start, end, elapsed, nodes, tres, _, reason = fields
    state = job_state(slurm_state)
    if state is JobState.FAILED and any(job_state(step[2]) is JobState.OUT_OF_MEMORY for step in steps):
        # The script sees only a failed srun; the step says why. Slurm's own word stays in slurm_state.
        state = JobState.OUT_OF_MEMORY
    code, signal = exit_and_signal(exit_code)
    # A job cancelled while it waited has a start time now and then, but never nodes.
    started = unix_time(start) if node_names(nodes) else None
    elapsed_s = float(elapsed) if elapsed.strip().isdigit() and started is not None else None
    peak = max((memory_bytes(step[10]) or 0 for step in steps), default=0)
    gpus = gpu_count(tres)
    return AccountingRow(
        job_id=job_id,
        name=name,
        submitted=unix_time(submitted),
        status=JobStatus(
            job_id=job_id,
            state=state,
            slurm_state=slurm_state.strip(),
            # sacct keeps the last reason it *waited* for; of a job that ran it says nothing about the end.
            reason="" if started is not None else text(reason),
            exit_code=code if state.finished else None,
            signal=signal if state.finished else None,
            nodes=node_names(nodes),
            start=started,
            end=unix_time(end) if state.finished else None,
            elapsed_s=elapsed_s,
            gpu_hours=None if elapsed_s is None else gpus * elapsed_s / 3600.0,
            peak_memory_gib=peak / 2**30 if peak else None,
        ),
    )
