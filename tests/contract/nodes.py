"""Nodes of a cluster that share one folder, each through its own client's cache (lagging_fs.py), on this machine.

Every node sees the folder under the same path, as on a cluster, because its processes have a mount namespace of their
own; without one (the test itself) the path is the folder as it really is. A bell does not ring from one to the other:
each has a temporary directory of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import serving

INSTALL = "sudo tests/contract/install.sh"
_WITHIN = 'mount --bind "$0" "$1" && shift && exec "$@"'
START_S = 30.0


@dataclass
class Node:
    """One node: what runs on it (`processes`), where its view is mounted, which faults it meets."""

    name: str
    view: Path
    processes: serving.Processes
    _faults: Path

    def fails(self, *rules: dict[str, Any]) -> None:
        """From now on; none: from now on nothing does. Rules as in lagging_fs.py."""
        fresh = self._faults.with_suffix(".new")
        fresh.write_text(json.dumps(rules))
        fresh.rename(self._faults)


@contextlib.contextmanager
def nodes(folder: Path, shared: Path, *names: str, lag_s: float) -> Iterator[list[Node]]:
    """Nodes that see `shared`; their logs, views and temporary directories lie below `folder`."""
    if (reason := why_not()) is not None:
        pytest.skip(f"{reason}; {INSTALL} && sudo .venv/bin/python -m pytest tests/contract -k filesystem")
    shared.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_node(folder / name, shared, name, lag_s)) for name in names]


def why_not() -> str | None:
    """Why no such filesystem can be mounted here; None if it can."""
    if shutil.which("fusermount3") is None:
        return "libfuse 3 is not installed"
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "mounting needs root and /dev/fuse"
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return "mount namespaces need CAP_SYS_ADMIN (docker run --privileged)" if probe.returncode else None


@contextlib.contextmanager
def _node(folder: Path, shared: Path, name: str, lag_s: float) -> Iterator[Node]:
    view, temporary, faults = folder / "view", folder / "tmp", folder / "faults.json"
    for part in (view, temporary):
        part.mkdir(parents=True)
    within = ("unshare", "--mount", "--propagation", "private", "bash", "-c", _WITHIN, str(view), str(shared))
    argv = [str(serving.HERE / "lagging_fs.py"), str(shared), str(view), "--lag-s", str(lag_s), "--faults", str(faults)]
    mounted = serving.Processes(folder)
    process = mounted.start("filesystem", *argv, env={"FUSE_LIBRARY_NAME": "fuse3"})
    try:
        serving.wait_for(lambda: os.path.ismount(view) or process.poll() is not None, START_S, "the mount")
        assert process.poll() is None, mounted.log("filesystem")
        with serving.processes_in(folder, within, {"TMPDIR": str(temporary)}) as processes:
            yield Node(name, view, processes, faults)
    finally:
        subprocess.run(["umount", "-l", view], capture_output=True, check=False)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
