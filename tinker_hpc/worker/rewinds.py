"""What the loop took back (log/rewinds.py), as rank 0 knows it when it starts to read the logs."""

from __future__ import annotations

from tinker_hpc.log import Record
from tinker_hpc.log.rewinds import read_rewinds, taken_back
from tinker_hpc.run_folder import WorkerFolder


class Rewinds:
    """Read once; a rewind that comes later is a `rewind` record in the request log, and the worker begins again."""

    def __init__(self, folder: WorkerFolder) -> None:
        rewinds = read_rewinds(folder)
        self._known = len(rewinds)
        self.seqs = taken_back(rewinds)
        """of the requests that do not count"""
        self.request_ids: set[str] = set()
        """of those met in the log so far: what they saved may be saved over"""

    def is_known(self, number: int) -> bool:
        """Whether the rewind that a record speaks of was known from the start."""
        return number <= self._known

    def takes_back(self, request: Record) -> bool:
        """Whether to leave this request out; keeps its id in mind."""
        if request.header["seq"] not in self.seqs:
            return False
        self.request_ids.add(request.header["request_id"])
        return True
