"""An index of the runs under a data root: what `tinker-hpc ls` reads. Never the truth.

The truth is the run folders (run_folder.py). The index saves reading every folder of the past year on a slow
filesystem: runs that ended are remembered, only new and live ones are read again, and those that were resumed, on
whatever machine, which the listing of their jobs tells. It is SQLite, so it lies on this
machine's own disk; two login nodes have one each, and deleting or damaging either costs one slower `ls`.

    runs(data_root, run_id, kind, name, base_model, cluster, job_id, created_at, ended_at, state, reason,
         final, details)           created_at, ended_at: unix seconds; details: the last known status, JSON
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tinker_hpc.errors import DataRootError
from tinker_hpc.private_files import make_private
from tinker_hpc.run_folder import RunFolder

_TABLE = "runs_2"  # the number is the schema's: another one, and the old table is simply not read
_KEY = ("data_root", "run_id")


@dataclass(frozen=True)
class RunRow:
    """One line of the index. `final` says that the run has ended and the row will not change unless it is resumed."""

    run_id: str
    kind: str = "run"
    name: str = ""
    base_model: str = ""
    cluster: str = ""
    job_id: str | None = None
    created_at: float = 0.0
    ended_at: float | None = None
    state: str | None = None
    """launch's JobState by name; None where only Slurm can say."""
    reason: str = ""
    final: bool = False
    details: str = ""
    """The whole status of a final row as JSON: what accounting said, so that it need not be asked again."""


def row_from_folder(folder: RunFolder) -> RunRow | None:
    """What a run's own files say, or None for a folder that is not a run (yet), or whose files cannot be read."""
    try:
        spec = folder.read(folder.spec)
        submitted = folder.read(folder.submitted) or {}
        outcome = folder.read(folder.outcome) or {}
    except DataRootError:  # one bad folder must not hide the others; `status ID` says what is wrong with it
        return None
    if spec is None:
        return None
    cluster = spec.get("cluster")
    return RunRow(
        run_id=folder.run_id,
        kind=str(spec.get("kind", "run")),
        name=str(spec.get("name", "")),
        base_model=str(spec.get("base_model", "")),
        cluster=str(cluster.get("name", "") if isinstance(cluster, dict) else cluster or ""),
        job_id=str(submitted["job_id"]) if submitted.get("job_id") is not None else None,
        created_at=float(spec.get("created_at") or submitted.get("submitted_at") or 0.0),
        ended_at=outcome.get("ended_at"),
        state={"succeeded": "COMPLETED", "failed": "FAILED"}.get(str(outcome.get("state"))),
        reason=str(outcome.get("error") or ""),
    )


def _goes_on(row: RunRow, folder: RunFolder) -> bool:
    """Whether a job was submitted after the row became final (tinker_hpc/resume.py). Lists jobs/, opens no file."""
    known = json.loads(row.details).get("job_ids", []) if row.details else []
    try:
        further = [name for name in os.listdir(folder.jobs) if name.endswith(".json") and not name.startswith(".")]
    except OSError:
        return False
    return len(further) + 1 > len(known) > 0


class Registry:
    """The index of one data root, on this machine's own disk.

    Args:
        state_dir: local folder of registry.db (`Config.state_dir`).
        data_root: whose runs.

    A database that is missing, damaged or of another schema is rebuilt; one that cannot be written (a full or
    read-only home) is replaced by one in memory. Neither is worth an error: the run folders say the same.
    """

    def __init__(self, state_dir: Path, data_root: Path) -> None:
        self.path = state_dir / "registry.db"
        self._data_root = data_root
        self._memory: sqlite3.Connection | None = None

    def refresh(self) -> list[RunRow]:
        """Bring the index up to the run folders and return every run, newest first.

        Raises: DataRootError if the data root is no folder, or may not be read.
        """
        known = {row.run_id: row for row in self._rows()}
        try:
            names = sorted(os.listdir(self._data_root / "runs"))
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise DataRootError(
                f"cannot list {self._data_root / 'runs'}: {error.strerror}. Set data_root in the configuration file, "
                "or TINKER_HPC_DATA_ROOT, to the folder your runs are in, or check its permissions.",
                path=str(self._data_root),
            ) from error
        rows: list[RunRow] = []
        changed: list[RunRow] = []
        for name in names:
            old, folder = known.get(name), RunFolder(self._data_root / "runs" / name)
            if old is not None and old.final and not _goes_on(old, folder):
                rows.append(old)
                continue
            row = row_from_folder(folder)
            if row is not None:
                rows.append(row)
                changed.append(row)
        gone = set(known) - {row.run_id for row in rows}
        self._write(changed, gone)
        return sorted(rows, key=lambda row: (row.created_at, row.run_id), reverse=True)

    def record(self, row: RunRow) -> None:
        """Remember what is known of one run now; `final` rows are not read from their folder again."""
        self._write([row], set())

    def _rows(self) -> list[RunRow]:
        def read(database: Any) -> list[RunRow]:
            names = {f.name for f in fields(RunRow)}
            found = database.table(_TABLE).rows_where("data_root = ?", [str(self._data_root)])
            return [
                replace(RunRow(**{key: row[key] for key in names}), final=bool(row["final"])) for row in list(found)
            ]

        return self._with_database(read)

    def _write(self, rows: Iterable[RunRow], gone: set[str]) -> None:
        records = [{"data_root": str(self._data_root), **asdict(row)} for row in rows]

        def write(database: Any) -> None:
            with database.conn:
                if records:
                    database.table(_TABLE).upsert_all(records, pk=_KEY)
                for run_id in gone:
                    database.table(_TABLE).delete_where("data_root = ? and run_id = ?", [str(self._data_root), run_id])

        if records or gone:
            self._with_database(write)

    def _with_database(self, action: Any) -> Any:
        try:
            return self._run(action)
        except sqlite3.OperationalError:  # locked for long, a full disk, a read-only home
            self._memory = self._memory or sqlite3.connect(":memory:")
            return self._run(action)
        except (sqlite3.DatabaseError, KeyError, TypeError):  # not a database, or not our columns
            self._discard()
            return self._run(action)

    def _run(self, action: Any) -> Any:
        import sqlite_utils

        connection = self._memory or self._open()
        try:
            database = sqlite_utils.Database(connection)
            if not database.table(_TABLE).exists():
                columns: dict[str, type] = {f.name: str for f in fields(RunRow)}
                columns.update(created_at=float, ended_at=float, final=int)
                database.table(_TABLE).create({"data_root": str, **columns}, pk=_KEY, if_not_exists=True)
            return action(database)
        finally:
            if connection is not self._memory:
                connection.close()

    def _open(self) -> sqlite3.Connection:
        try:
            make_private(self.path.parent)
        except OSError as error:
            raise sqlite3.OperationalError(str(error)) from error
        return sqlite3.connect(self.path, timeout=5.0)

    def _discard(self) -> None:
        for suffix in ("", "-journal", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
