"""Appends for ever and says on stdout what is durable: `python log_writer.py FOLDER NUM_THREADS`. For killing."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from pathlib import Path

import numpy as np

from tinker_hpc.log import Record, RequestLog


def main(folder: Path, num_threads: int) -> None:
    log = RequestLog(folder)
    os.write(1, f"opened {log.last}\n".encode())

    def append(thread: int) -> None:
        for n in itertools.count():
            name = f"{os.getpid()}-{thread}-{n}"
            payload = np.frombuffer(name.encode() * (1 + n % 50), np.uint8)
            seqs = log.append([Record({"name": name}, {"payload": payload})])
            os.write(1, f"{seqs[0]} {name}\n".encode())  # one write of a short line: not torn by a kill

    for thread in range(num_threads):
        threading.Thread(target=append, args=(thread,)).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
