"""The test cluster as an object: bring it up, act on it as a user, break it, ask Slurm behind tinker_hpc's back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
PROGRAMS = HERE / "programs"
TINY_MODEL = REPOSITORY / "tests" / "models" / "tiny-qwen3"
INSTALL = "sudo tests/slurm/install.sh"


@dataclass(frozen=True)
class SlurmCluster:
    """One cluster made by cluster.sh; `base` holds all of it."""

    base: Path
    port_base: int

    def script(self, *arguments: str, check: bool = True, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Call cluster.sh."""
        done = subprocess.run(
            [str(HERE / "cluster.sh"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self._environment(),
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"cluster.sh {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done

    def as_user(self, user: str, *argv: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command as a user on the login node, in the user's home."""
        home = self.home(user)
        return self.script(
            "exec", "-u", user, "env", *self._user_environment(), "bash", "-c", 'cd "$1"; shift; exec "$@"', "_",
            str(home), *argv, check=False, timeout_s=timeout_s,
        )  # fmt: skip

    def program(self, user: str, name: str, *arguments: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """Run tests/slurm/programs/NAME as a user and return the JSON object it printed last."""
        done = self.as_user(user, sys.executable, str(PROGRAMS / name), *arguments, timeout_s=timeout_s)
        if done.returncode:
            raise AssertionError(f"{name} {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def act(self, user: str, what: str, *arguments: str, timeout_s: float = 200.0) -> dict[str, Any]:
        """One of programs/act.py's actions, in a process of its own."""
        return self.program(user, "act.py", what, *arguments, timeout_s=timeout_s)

    def submit(self, *command: str, user: str = "alice", **options: Any) -> dict[str, Any]:
        """Submit a command as the loop of a run beside the tiny model; the answer has run_id and job_id."""
        return self.act(user, "submit", json.dumps({"base_model": str(TINY_MODEL), **options}), *command)

    def run_folder(self, run_id: str, user: str = "alice") -> Path:
        """A run's folder, seen from the host."""
        return self.home(user) / "tinker_hpc_data" / "runs" / run_id

    def events(self, run_id: str) -> list[str]:
        """Names of the events of a run so far."""
        path = self.run_folder(run_id) / "events.jsonl"
        return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []

    def slurm(self, *argv: str) -> str:
        """Run a Slurm command as root on the login node and return what it printed."""
        return self.script("exec", *argv).stdout

    def sacct(self, job_id: str, *columns: str) -> list[str]:
        """Columns of the job's own accounting row (not its steps)."""
        rows = self.slurm("sacct", "-X", "-n", "-P", "-j", job_id, f"--format={','.join(columns)}").splitlines()
        return rows[-1].split("|") if rows else []

    def home(self, user: str) -> Path:
        """A user's home, seen from the host."""
        return self.base / "home" / user

    def has_cgroups(self) -> bool:
        """Whether memory limits are enforced by cgroups here."""
        return "cgroup v1" in self.script("status").stdout

    def _environment(self) -> dict[str, str]:
        # The checkout and the interpreter may lie under /root or another closed folder.
        reachable = [str(REPOSITORY), sys.prefix, sys.base_prefix]
        return {
            **os.environ,
            "SLURMTEST_BASE": str(self.base),
            "SLURMTEST_PORT_BASE": str(self.port_base),
            "SLURMTEST_OPEN": ":".join(dict.fromkeys(reachable)),
        }

    @staticmethod
    def _user_environment() -> Sequence[str]:
        # Two cores carry every node of this cluster: one thread a process.
        return ["OMP_NUM_THREADS=1", "PYTHONDONTWRITEBYTECODE=1", f"PATH={Path(sys.executable).parent}:/usr/bin:/bin"]


def until(condition: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    """Poll until `condition` gives something true, and return it; fail saying what never came."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.2)
    return value
