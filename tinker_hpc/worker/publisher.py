"""Step 7 of a request. Before: worker/desk.py. After: log/result_log.py, then the gateway's future.

Results go to the disk in a thread of their own, in the order they were computed, as many at a time as have gathered:
the next batch computes while the last one's fsync runs. Nothing is visible before it is durable; then the bell rings.
"""

from __future__ import annotations

import sys
import threading
import time

from tinker_hpc.errors import DataRootError
from tinker_hpc.log import Bell, Record, ResultLog

QUEUE_BYTES = 256 << 20
"""`publish` waits when more than this is on its way: a full disk must stop the computing, not fill the memory."""
RETRY_S = 2.0
COMPLAIN_EVERY_S = 60.0


class Publisher:
    """Writes results behind the computing. `publish` from one thread."""

    def __init__(self, log: ResultLog, bell: Bell) -> None:
        self._log = log
        self._bell = bell
        self._condition = threading.Condition()
        self._queue: list[Record] = []
        self._num_bytes = 0
        self._writing = False
        self._closing = False
        self._error: Exception | None = None
        self.num_handed = 0
        """Records that `publish` took so far."""
        self._num_durable = 0
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, record: Record) -> None:
        """Hand over one record. Raises: LeaseLostError, or whatever ended the thread."""
        with self._condition:
            self._condition.wait_for(lambda: self._num_bytes < QUEUE_BYTES or self._error is not None)
            self._raise()
            self._queue.append(record)
            self._num_bytes += _size(record)
            self.num_handed += 1
            self._condition.notify_all()

    def check(self) -> None:
        """Raises: LeaseLostError if another worker took over, or whatever else ended the thread."""
        with self._condition:
            self._raise()

    def flush(self) -> None:
        """Wait until everything is durable. Raises: as `check`."""
        with self._condition:
            self._condition.wait_for(lambda: (not self._queue and not self._writing) or self._error is not None)
            self._raise()

    def wait_durable(self, num_records: int) -> None:
        """Wait until the first `num_records` that `publish` took are durable. From any thread. Raises: as `check`."""
        with self._condition:
            self._condition.wait_for(lambda: self._num_durable >= num_records or self._error is not None)
            self._raise()

    def close(self) -> None:
        """Flush and end the thread. Raises: as `check`."""
        try:
            self.flush()
        finally:
            with self._condition:
                self._closing = True
                self._condition.notify_all()
            self._thread.join()
            self._log.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._condition:
                self._writing = False
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                records, self._queue, self._num_bytes = self._queue, [], 0
                self._writing = True
            try:
                self._write(records)
            except Exception as error:
                with self._condition:
                    self._error = error
                    self._condition.notify_all()
                return
            with self._condition:
                self._num_durable += len(records)

    def _write(self, records: list[Record]) -> None:
        complained_at = -COMPLAIN_EVERY_S
        while True:
            try:
                self._log.publish(records)
                break
            except DataRootError as error:
                if error.attributes.get("visible"):
                    break
                # A full disk must not cost the trained weights: keep the results and wait for room.
                if time.monotonic() - complained_at >= COMPLAIN_EVERY_S:
                    complained_at = time.monotonic()
                    print(f"worker: {error} {len(records)} results wait; trying again.", file=sys.stderr, flush=True)
                time.sleep(RETRY_S)
        self._bell.ring()


def _size(record: Record) -> int:
    return 512 + sum(array.nbytes for array in record.arrays.values())
