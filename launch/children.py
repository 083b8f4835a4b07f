"""The processes a supervisor starts: their command lines and environments (pure), and a handle on each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import parting, process_tree
from launch.job_spec import JobSpec
from launch.log_tail import read_tail
from launch.loop_start import sitecustomize
from tinker_hpc.run_folder import RunFolder, seed_of_run

_LOOP_START = Path(sitecustomize.__file__).parent
MAX_RESTARTS = 3
"""How often torch's elastic agent starts the ranks again before it gives up."""


class Child:
    """One process started by the supervisor, its output appended to a log."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        *,
        cwd: str | None = None,
        umask: int = 0o077,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log = log
        self.started_at = time.time()
        with log.open("ab") as file:
            self._log_start = file.tell()
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
                umask=umask,
                preexec_fn=process_tree.child_setup(),  # noqa: PLW1509  the supervisor has one thread
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def log_text(self) -> str:
        """The end of what this process (not one before it) wrote."""
        return read_tail(self.log, since=self._log_start)

    def kill(self) -> None:
        """End it and all it started, without asking."""
        who = process_tree.identity(self.pid)
        if who is not None:
            process_tree.end(who, grace_s=0.0)

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n if signal n ended it, as shells and Slurm say it."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code


def gateway_argv(run_folder: RunFolder) -> list[str]:
    """The gateway of a run."""
    return [sys.executable, "-P", "-m", "tinker_hpc.gateway", "--run-dir", str(run_folder.path)]


def worker_watch_argv(run_folder: RunFolder) -> list[str]:
    """Who writes the status of a run's further workers."""
    return [sys.executable, "-P", "-m", "tinker_hpc.worker_watch", "--run-dir", str(run_folder.path)]


def loop_argv(spec: JobSpec, run_folder: RunFolder) -> list[str]:
    """The user's program, or ours that unpickles the user's function."""
    if spec.command is not None:
        return list(spec.command)
    return [sys.executable, "-m", "tinker_hpc.loop", "--run-dir", str(run_folder.path)]


def agent_argv(
    spec: JobSpec, run_folder: RunFolder, *, node_rank: int, own_address: str, endpoint: tuple[str, int] | None
) -> list[str]:
    """torch's elastic agent for one node's ranks.

    Args:
        own_address: how the other nodes reach this one. torch sorts nodes by this text to give out ranks.
        endpoint: host and port where the first node's agent keeps the meeting; None for one node, which picks a free
            port itself.
    """
    host, port = endpoint or ("localhost", 0)
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={spec.nodes}",
        f"--nproc-per-node={spec.ranks_per_node}",
        f"--max-restarts={MAX_RESTARTS}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={spec.run_id}",
        f"--rdzv-endpoint={host}:{port}",
        # Said, not guessed: torch compares host names, and on some clusters every node answers to "localhost".
        f"--rdzv-conf=is_host={1 if node_rank == 0 else 0}",
        f"--local-addr={own_address}",
        "--module",
        "tinker_hpc.worker",
        "--worker-dir",
        str(run_folder.worker(0).path),
    ]


def agent_environment(spec: JobSpec, environ: Mapping[str, str], *, cores: int) -> dict[str, str]:
    """Environment of the ranks: their share of the cores, and the first GPUs of the node."""
    env = {
        **_without_proxy(environ),
        process_tree.RUN_ID_VARIABLE: spec.run_id,
        # A store of its own for each start of the ranks. By default torch 2.13 keeps one for all starts, and ranks
        # started again find their predecessors' addresses in it: "Gloo connectFullMesh failed ... Connection refused".
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # As -P, for the agent and the ranks it starts: see render.python_of.
        "PYTHONSAFEPATH": "1",
        # Ranks put their state away when asked to end, or end at once; one that has not by then stands still.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(parting.LONGEST_S) + 5),
    }
    # Without a word from the user: a node's cores divided by its ranks. torch would say 1 on any number of cores.
    env.setdefault("OMP_NUM_THREADS", str(max(1, min(cores, spec.cpus_per_node) // spec.ranks_per_node)))
    # Always said, so that a rank knows whether it was given a GPU (megatron_adapters/runtime.py). A job without any may
    # see those of its node, or a value of the shell that it was submitted from.
    devices = _devices(environ) or [str(index) for index in range(spec.ranks_per_node)]
    env["CUDA_VISIBLE_DEVICES"] = ",".join(devices[: spec.ranks_per_node]) if spec.gpus_per_node else ""
    # Sampling's cache and training's activations take turns in the same memory: fixed segments, once cut to the sizes
    # of one, are of no use to the other. The user may have said otherwise by either of the names that torch reads.
    if spec.gpus_per_node and "PYTORCH_CUDA_ALLOC_CONF" not in env:
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return env


def gateway_environment(spec: JobSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment of the gateway: no GPU, it would only take memory on one."""
    env = {**_without_proxy(environ), process_tree.RUN_ID_VARIABLE: spec.run_id}
    if _devices(environ) is not None:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def loop_environment(spec: JobSpec, environ: Mapping[str, str], *, base_url: str, api_key: str) -> dict[str, str]:
    """Environment of the user's loop: where the gateway is, and the GPUs no rank uses."""
    seed = str(seed_of_run(spec.run_id, environ))
    env = {
        **_without_proxy(environ),
        process_tree.RUN_ID_VARIABLE: spec.run_id,
        "TINKER_BASE_URL": base_url,
        "TINKER_API_KEY": api_key,
        "TINKER_TELEMETRY": "0",
        # A log that is followed should not lag 8 KiB behind.
        "PYTHONUNBUFFERED": "1",
        # The order of sets of texts, and what it draws, is the same when the loop is started again.
        "PYTHONHASHSEED": seed,
        sitecustomize.SEED_VARIABLE: seed,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_LOOP_START), environ.get("PYTHONPATH")])),
        # `python program.py` means the interpreter tinker_hpc is installed in.
        "PATH": f"{os.path.dirname(sys.executable)}:{environ.get('PATH', '/usr/bin:/bin')}",
    }
    if (devices := _devices(environ)) is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices[spec.ranks_per_node :])
    return env


def _without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """The loopback address must never go through a site's web proxy."""
    env = dict(environ)
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in env.get(name, "").split(",") if host]
        env[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    return env


def _devices(environ: Mapping[str, str]) -> list[str] | None:
    """The GPUs this job may use; None where nobody said (a CPU node)."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [name for name in value.split(",") if name]
