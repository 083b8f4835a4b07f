"""Step 5 of a request. Before: worker/desk.py. After: worker/loop.py on all ranks.

Puts the experts that were noted while its data were sampled beside a forward_backward: the request's header says in
which results they are (gateway/routing.py), which are durable. Rank 0 reads them and all ranks are told.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from tinker_hpc.errors import CorruptLogError
from tinker_hpc.log import Record, ResultFinder
from tinker_hpc.log.looking import LAG_S
from tinker_hpc.routing_record import Source, decode


class RecordedExperts:
    """Reads the results of one worker, older ones' too."""

    def __init__(self, worker_folder: Path) -> None:
        self._folder = worker_folder
        self._finder = ResultFinder(worker_folder)

    def beside(self, request: Record) -> Record:
        """The request with the array `experts` [rows, M, K]: of its replayed data, one after the other.

        Raises: CorruptLogError if a result is not to be seen, or is not what the request says.
        """
        sources = [Source(*source) for source in request.header.get("routing_from", ()) if source is not None]
        if not sources:
            return request
        pieces = {source: self._read(source) for source in sorted(set(sources))}  # in order: files are read once
        experts = np.concatenate([pieces[source] for source in sources])
        return Record(request.header, {**request.arrays, "experts": experts})

    def _read(self, source: Source) -> np.ndarray:
        deadline = time.monotonic() + LAG_S
        while (result := self._finder.find(source.fence, source.number)) is None:
            if time.monotonic() > deadline:
                raise CorruptLogError(
                    f"{self._folder}: result {source.number} of worker {source.fence} is missing, whose experts a pass "
                    "is to be trained with. Bring it back from a snapshot of the filesystem.",
                    path=str(self._folder),
                )
            time.sleep(0.1)
        try:
            return decode(result.header, result.arrays, source.sample)
        except (KeyError, IndexError) as error:
            raise CorruptLogError(
                f"{self._folder}: result {source.number} of worker {source.fence} has no experts of sample "
                f"{source.sample}, which a request says are there.",
                path=str(self._folder),
            ) from error
