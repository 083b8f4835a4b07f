"""Where Slurm's commands run: this machine today, one behind ssh later. One verb, one seam.

Nothing above this file calls `subprocess` for a Slurm command, so a host elsewhere is one more class.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinker_hpc.errors import SlurmUnavailableError

COMMAND_TIMEOUT_S = 60.0
"""Longer than Slurm's own: squeue gives up on a dead controller after 9 s, scontrol show job after 18 s."""


@dataclass(frozen=True)
class CommandResult:
    """What a command printed and how it ended."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """True for exit code 0."""
        return self.returncode == 0

    @property
    def words(self) -> str:
        """What the command had to say, for an error message: stderr, else stdout."""
        return self.stderr.strip() or self.stdout.strip() or f"exit code {self.returncode}, no output"


class Host(Protocol):
    """A machine on which Slurm's commands work."""

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> CommandResult:
        """Run a command to its end, with no input.

        Raises: SlurmUnavailableError if it is not installed there (`missing`), cannot be started, or does not end in
        time (`timed_out`).
        """
        ...


@dataclass(frozen=True)
class LocalHost:
    """This machine: a login node, or a node of a job."""

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> CommandResult:
        try:
            done = subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                env=scrubbed(os.environ),
                check=False,
            )
        except FileNotFoundError as error:
            raise SlurmUnavailableError(
                f"`{argv[0]}` is not installed on this machine ({os.uname().nodename}). Run this on a login "
                'node of the cluster, or use cluster="local".',
                command=argv[0],
                missing=True,
            ) from error
        except OSError as error:
            # Some sites leave the file there and take the right to run it; a node may also be out of processes.
            raise SlurmUnavailableError(
                f"`{argv[0]}` cannot be started on this machine ({os.uname().nodename}): {error.strerror}.",
                command=argv[0],
                missing=isinstance(error, PermissionError),
            ) from error
        except subprocess.TimeoutExpired as error:
            raise SlurmUnavailableError(
                f"`{' '.join(argv)}` gave no answer within {timeout_s:.0f} s. Slurm may be overloaded or down: "
                "`scontrol ping` tells. Try again later.",
                command=argv[0],
                timed_out=True,
            ) from error
        return CommandResult(tuple(argv), done.returncode, done.stdout, done.stderr)


_OF_ONE_JOB = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "TMPDIR")


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what an enclosing Slurm job or a user's profile would leak into a command (pure).

    SBATCH_* and SQUEUE_* are read as options and would overrule ours; SLURM_* of an enclosing job travel into the new
    one (an inherited SLURM_CPU_BIND pins every rank to the same core; two SLURM_MEM_PER_* make srun refuse).
    SLURM_CONF stays: some clusters are found by it alone. Slurm's time format is reset to the one we parse.
    """
    leaks = (
        "TINKER_HPC_RUN_ID",
        "SUBMITIT_",
        "SLURM_",
        "SLURMD_",
        "SBATCH_",
        "SRUN_",
        "SALLOC_",
        "SQUEUE_",
        "SACCT_",
        "SCANCEL_",
        "PMIX_",
        "PMI_",
    )
    if "SLURM_JOB_ID" in environ:  # a job that submits another: its GPUs and its scratch are its own
        environ = {name: value for name, value in environ.items() if name not in _OF_ONE_JOB}
    kept = {name: value for name, value in environ.items() if not name.startswith(leaks) or name == "SLURM_CONF"}
    kept["LC_ALL"] = "C"  # Slurm's messages are matched by their English words
    kept["SLURM_TIME_FORMAT"] = "%s"  # unix seconds: no time zone, no locale
    return kept
