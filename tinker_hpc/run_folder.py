"""Where everything of a run lies on the shared filesystem, and who may write it.

    <data root>/                       0700 (0710 once something is published: gateway/publishing.py)
      checkpoints/<model id>/{weights,sampler_weights,external_weights}/<name>/   adapter, optimizer, checkpoint.json
                                 .<name>.retention.json   gateway: how long it is kept, where that was changed
      sites/<cluster>.json   a job that was refused something: how jobs are continued there (launch/site.py)
      runs/<run id>/
        run.json             client, once: the job spec
        submitted.json       client, once: the first job's id, cluster, time
        jobs/<n>.json        whoever submitted it, once: every further job, from 2 on (launch/lineage.py)
        attempts/            supervisors: which job works on the run, and how those before ended (launch/attempts.py)
        cancel.json          client, once: somebody asked for the end
        payload.pkl          client, once: the user's function and arguments
        events.jsonl         supervisor on the first node: the run's history, one JSON object a line
        outcome.json         supervisor on the first node, once: how the loop ended
        result.pkl           loop process, once: its return value or exception
        gateway.json         gateway: base_url, api_key (0600)
        sessions.json        gateway: the SDK sessions it opened
        custom_losses/       gateway: uploaded losses, <loss id>.json, once each
        reads.json           gateway: the checkpoints it has read; they are kept while it goes on (gateway/retention.py)
        exports/             gateway: archives for download, emptied when it starts
        traces/              gateway: timelines of sessions
        gateway_lease/       fencing numbers of the gateways, as a worker's lease/
        loop.json            supervisor: how often the loop was started
        claims.jsonl         gateway: recorded requests that a loop started again has asked for again
        slurm/               submitit's own folder: scripts, pickles, job logs
        logs/                gateway.log, loop.log, worker-<node rank>.log
        hub/                 supervisor or session: the loop's Hugging Face cache, links only (launch/hub_view.py)
        workers/<k>/         one worker, one base model; from the second on a link to workers/0 of the run folder
                             `<run id>-w<k>`, because one job is one run folder
          worker.json        client, once: base_model, base_model_folder, layout. Tests alone put in
                             snapshot_interval_s (worker/snapshot_clock.py) and hang_floor_s (worker/hang.py)
          status.json        supervisor (a run's workers/0) or worker_watch.py (all others): queued, starting, ready,
                             ended and why
          rendezvous.json    first node: address and port for the other nodes
          requests/          request log, written by the gateway
          rewinds.json       gateway: requests that a loop started again took back (gateway/replay.py)
          results/           result log, written by the worker that holds the lease
          lease/             fencing numbers
          snapshots/         worker rank 0: its whole state now and then (worker/snapshot_files.py)
          aside/             worker rank 0: sampling snapshots unused for a while (worker/aside.py)
          metrics.jsonl      worker rank 0: a line per optimizer step
          poison/<seq>.json  worker, any rank but 0, once: a request that broke this rank alone (worker/poison.py)

One writer per file. JSON files are replaced whole (write, fsync, rename), so a reader sees the old or the new one.
"""

from __future__ import annotations

import os
import reprlib
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_hpc.errors import DataRootError, UnknownRunError
from tinker_hpc.private_files import check_data_root, make_private, read_json, write_json


def seed_of_run(run_id: str, environ: Mapping[str, str]) -> int:
    """A seed of the run's own, the same in all its jobs and at every start of its loop: 0 to 2**32 - 1.

    Python's own variable for it, where the user has set it to a number when submitting: two runs with the same
    PYTHONHASHSEED draw the same. Else it comes from the run's id.
    """
    given = environ.get("PYTHONHASHSEED", "")
    return int(given) if given.isdecimal() and int(given) < 2**32 else zlib.crc32(run_id.encode())


def model_folder_name(model_id: str) -> str:
    """Folder name of a model id `<session>:train:<n>`; colons trouble PATH-like variables and rsync."""
    return model_id.replace(":", "_")


def checkpoint_folder(root: Path, model_id: str, kind: str, name: str) -> Path:
    """Folder of `tinker://<model_id>/<kind>/<name>`; kind is `weights` or `sampler_weights`."""
    return root / "checkpoints" / model_folder_name(model_id) / kind / name


@dataclass(frozen=True)
class WorkerFolder:
    """One worker's part of a run folder: its base model, its two logs, its lease."""

    path: Path

    @property
    def declaration(self) -> Path:
        return self.path / "worker.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def rendezvous(self) -> Path:
        return self.path / "rendezvous.json"

    @property
    def requests(self) -> Path:
        return self.path / "requests"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def lease(self) -> Path:
        return self.path / "lease"

    @property
    def rewinds(self) -> Path:
        return self.path / "rewinds.json"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def aside(self) -> Path:
        return self.path / "aside"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def create(
        self, *, base_model: str, base_model_folder: str, layout: Mapping[str, Any] | None = None
    ) -> WorkerFolder:
        """Make the folders, then declare the worker (the declaration last: it says the rest is there)."""
        for folder in (self.path, self.requests, self.results, self.lease):
            make_private(folder)
        write_json(
            self.declaration,
            {"base_model": base_model, "base_model_folder": base_model_folder, "layout": dict(layout or {})},
        )
        return self


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. Creating the object touches nothing."""

    path: Path

    @classmethod
    def new(cls, root: Path, name: str = "run") -> RunFolder:
        """Reserve a fresh run id `<name>-<date>-<6 hex digits>` under the data root."""
        check_data_root(root)
        run_id = f"{name}-{time.strftime('%Y%m%d')}-{secrets.token_hex(3)}"
        folder = cls(root / "runs" / run_id)
        make_private(root / "runs")
        for part in (folder.path, folder.slurm, folder.logs, folder.path / "workers"):
            make_private(part)
        return folder

    @classmethod
    def find(cls, root: Path, run_id: str) -> RunFolder:
        """The run of that id. Raises: UnknownRunError with the data root searched; DataRootError if it may not be."""
        folder = cls(root / "runs" / run_id)
        try:
            found = "/" not in run_id and folder.spec.exists()
        except OSError as error:
            raise folder.unreadable(folder.spec, error) from error
        if not found:
            raise UnknownRunError(f"no run {run_id!r} under {root / 'runs'}. `tinker-hpc ls` lists the runs.")
        return folder

    def add_worker_run(self, index: int) -> RunFolder:
        """Run folder for the job of a further base model, seen from here as workers/<index>."""
        folder = RunFolder(self.path.with_name(f"{self.run_id}-w{index}"))
        for part in (folder.path, folder.slurm, folder.logs, folder.path / "workers"):
            make_private(part)
        # Relative, so that a data root that is moved stays whole.
        os.symlink(os.path.relpath(folder.worker(0).path, self.path / "workers"), self.worker(index).path)
        return folder

    def worker_runs(self) -> Iterator[RunFolder]:
        """The run folders that `add_worker_run` made, in order."""
        for index in self._worker_numbers():
            if self.worker(index).path.is_symlink():
                yield RunFolder(self.path.with_name(f"{self.run_id}-w{index}"))

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def data_root(self) -> Path:
        return self.path.parent.parent

    @property
    def spec(self) -> Path:
        return self.path / "run.json"

    @property
    def submitted(self) -> Path:
        return self.path / "submitted.json"

    @property
    def cancel(self) -> Path:
        return self.path / "cancel.json"

    @property
    def payload(self) -> Path:
        return self.path / "payload.pkl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def result(self) -> Path:
        return self.path / "result.pkl"

    @property
    def gateway(self) -> Path:
        return self.path / "gateway.json"

    @property
    def sessions(self) -> Path:
        return self.path / "sessions.json"

    @property
    def reads(self) -> Path:
        return self.path / "reads.json"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def gateway_lease(self) -> Path:
        return self.path / "gateway_lease"

    @property
    def loop(self) -> Path:
        return self.path / "loop.json"

    @property
    def claims(self) -> Path:
        return self.path / "claims.jsonl"

    def loop_starts(self) -> int:
        """How often the loop was started; 0 where nobody counts (a session)."""
        return int((read_json(self.loop) or {}).get("starts", 0))

    def begin_loop(self) -> int:
        """Say, before a loop is started, that what asks from now on is a new process which begins at the beginning.

        Returns: the number of this start, from 1. Raises: DataRootError.
        """
        starts = self.loop_starts() + 1
        write_json(self.loop, {"starts": starts, "at": time.time()})
        return starts

    @property
    def custom_losses(self) -> Path:
        return self.path / "custom_losses"

    @property
    def slurm(self) -> Path:
        return self.path / "slurm"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def worker(self, index: int = 0) -> WorkerFolder:
        return WorkerFolder(self.path / "workers" / str(index))

    def workers(self) -> Iterator[WorkerFolder]:
        """Every declared worker, in the order they were declared."""
        for index in self._worker_numbers():
            folder = self.worker(index)
            if folder.declaration.exists():
                yield folder

    def _worker_numbers(self) -> list[int]:
        parent = self.path / "workers"
        try:
            return sorted(int(name) for name in os.listdir(parent) if name.isdigit())
        except OSError as error:
            raise self.unreadable(parent, error) from error

    def read(self, path: Path) -> dict[str, Any] | None:
        """What a JSON file of the run says; None while it does not exist.

        Raises: DataRootError if it cannot be read, or is damaged.
        """
        try:
            value = read_json(path)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"it holds {reprlib.repr(value)}, expected an object")
        except (OSError, ValueError) as error:
            raise self.unreadable(path, error) from error
        return value

    def unreadable(self, path: Path, error: Exception) -> DataRootError:
        """What to raise where a file or folder of the run cannot be read, or is damaged."""
        why = error.strerror if isinstance(error, OSError) else error
        return DataRootError(
            f"cannot read {path} of run {self.run_id}: {why}. Check its permissions, or bring it back from a backup; "
            f"jobs of the run that are still in Slurm's queue end by: scancel --name={self.run_id}",
            path=str(path),
        )
