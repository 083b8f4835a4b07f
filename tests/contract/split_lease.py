"""One part of a lease split, a process on a node of its own; argv: loser, winner or reader, worker folder, go file.

loser   takes the lease, publishes a; when told to, what it had checked its lease for before it lost it, then one more
winner  when told to, takes the lease, publishes b
reader  prints the name of every result that counts, until it is told to stop
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tinker_hpc.errors import LeaseLostError
from tinker_hpc.log import Lease, Record, ResultLog, ResultReader


class CheckedBefore(Lease):
    """A lease whose check came out well, just before it was lost."""

    def check(self) -> None:
        return


part, folder, go = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if part == "reader":
    reader = ResultReader(folder)
    while not go.exists():
        for record in reader.poll():
            if "name" in record.header:
                print("took", record.header["name"], flush=True)
        time.sleep(0.05)
    print("read all", flush=True)
    sys.exit()
if part == "winner":
    print("ready", flush=True)
    while not go.exists():
        time.sleep(0.05)
lease = Lease.acquire(folder / "lease", {"host": part})
log = ResultLog(folder, lease)
name = "a" if part == "loser" else "b"
log.publish([Record({"name": name})])
print("published", name, flush=True)
if part == "loser":
    while not go.exists():
        time.sleep(0.05)
    log.lease = CheckedBefore(lease.folder, lease.fence)
    log.publish([Record({"name": "late"})])
    print("published late", flush=True)
    log.lease = lease
    try:
        log.publish([Record({"name": "later"})])
    except LeaseLostError as error:
        print(error, flush=True)
