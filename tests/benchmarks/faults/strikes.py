"""The blows themselves, dealt from outside as a node, a kernel or an administrator would."""

from __future__ import annotations

import os
import time
from pathlib import Path

from plan import Strike
from slurm_machine import SlurmCluster

from launch import attempts
from tinker_hpc.run_folder import RunFolder

SETTLED_S = 6.0
"""A controller killed within some five seconds of a change forgets it (a job it had acknowledged is gone, its number is
given to the next); that is Slurm's, so the controller is left alone while any run's job is that young."""


class Striker:
    """Strikes one run on one cluster.

    Args:
        fill: a file on the filesystem of the data root; grown until the disk is full.
    """

    def __init__(self, cluster: SlurmCluster, run_id: str, program: str, fill: Path) -> None:
        self._cluster = cluster
        self._run_id = run_id
        self._folder = RunFolder(cluster.run_folder(run_id))
        self._program = program
        self._fill = fill

    def strike(self, strike: Strike) -> bool:
        """Deal one blow and, where it is one that passes, wait until it has. False if there was nothing to hit."""
        claim = attempts.newest_claim(self._folder) or {}
        node, job_id = str(claim.get("host", "")), str(claim.get("job_id", ""))
        if not node:
            return False
        if strike.what == "disk":
            return self._fill_disk(strike.lasts_s)
        if strike.what == "job":
            signal = ["-f", "-s", "KILL"] if strike.how == "KILL" else []
            return self._script("exec", "scancel", *signal, job_id) and self._state(job_id) != ""
        if strike.what in ("slurmd", "slurmctld"):
            daemon = node if strike.what == "slurmd" else "slurmctld"
            while strike.what == "slurmctld" and time.time() - self._youngest_job() < SETTLED_S:
                time.sleep(0.2)
            struck = self._script("daemon", "kill", daemon)
            time.sleep(strike.lasts_s)
            self._script("daemon", "start", daemon)
            return struck
        pids = self._processes(node, strike.what)
        if not pids:
            return False
        victim = pids[int(strike.lasts_s * 1000) % len(pids)]
        if not self._script("sh", node, "kill", f"-{strike.how}", victim):
            return False
        if strike.how == "STOP":
            time.sleep(strike.lasts_s)
            self._script("sh", node, "kill", "-CONT", victim)
        return True

    def _processes(self, node: str, what: str) -> list[str]:
        """Ids, in the node's own numbering, of the run's processes of that kind."""
        patterns = {
            "rank": ("tinker_hpc.worker", "--worker-dir", self._run_id, "!torch.distributed.run"),
            "agent": ("torch.distributed.run", self._run_id),
            "gateway": ("tinker_hpc.gateway", self._run_id),
            "loop": (self._program, "!torch.distributed.run", "!srun"),
            "supervisor": ("submitit.core._submit", self._run_id, "!srun"),
        }
        listing = self._cluster.script("sh", node, "ps", "-eo", "pid,args", "-ww", check=False).stdout
        found = []
        for line in listing.splitlines():
            pid, _, args = line.strip().partition(" ")
            if "ps -eo" in args or not pid.isdigit():
                continue
            if all((word[1:] not in args) if word.startswith("!") else (word in args) for word in patterns[what]):
                found.append(pid)
        if what == "loop":  # several runs of one program: the environment says which
            found = [pid for pid in found if self._is_ours(node, pid)]
        return found

    def _is_ours(self, node: str, pid: str) -> bool:
        environ = self._cluster.script("sh", node, "cat", f"/proc/{pid}/environ", check=False).stdout
        return f"TINKER_HPC_RUN_ID={self._run_id}" in environ.split("\0")

    def _fill_disk(self, seconds: float) -> bool:
        with self._fill.open("wb") as file:
            try:
                while True:
                    file.write(b"\0" * (1 << 20))
                    file.flush()
            except OSError:
                pass
            left = os.statvfs(self._fill.parent)
            time.sleep(seconds)
        self._fill.unlink()
        return left.f_bavail * left.f_frsize < 1 << 20

    def _youngest_job(self) -> float:
        """When the newest job of any run on the cluster was submitted or started, unix seconds."""
        runs = self._folder.path.parent
        written = [*runs.glob("*/submitted.json"), *runs.glob("*/jobs/*.json"), *runs.glob("*/attempts/claim-*")]
        return max(path.stat().st_mtime for path in written)

    def _state(self, job_id: str) -> str:
        return self._cluster.script("exec", "squeue", "-h", "-j", job_id, "-t", "all", "-o", "%T", check=False).stdout

    def _script(self, *arguments: str) -> bool:
        return self._cluster.script(*arguments, check=False).returncode == 0
