"""A notebook whose worker waits in the queue: what the stock SDK is told of why, and what it logs.

waiting_session.py BASE_MODEL CLUSTER FILE: appends a line {"why": ...} or {"logged": ...} to FILE for each, ends when
FILE.stop is there, and prints one JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tinker.lib.queue_state_logger import QueueStateLogger

import tinker_hpc


def main(base_model: str, cluster: str, file: str) -> None:
    stock, told = QueueStateLogger.on_queue_state_change, Path(file)

    def say(**line: str) -> None:
        with told.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def heard(self: Any, queue_state: Any, queue_state_reason: str | None) -> None:
        say(why=queue_state_reason or "", state=queue_state.value)
        stock(self, queue_state, queue_state_reason)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(logged=record.getMessage())

    QueueStateLogger.on_queue_state_change = heard
    logging.getLogger("tinker.lib.queue_state_logger").addHandler(Lines())
    with tinker_hpc.session(
        base_model=base_model, cluster=cluster, gpus_per_node=0, memory="2G", time=10, name="waits"
    ) as service:
        future = service.create_lora_training_client(base_model=base_model, rank=8)
        threading.Thread(target=future.result, daemon=True).start()
        stop = Path(f"{file}.stop")
        while not stop.exists():
            time.sleep(0.2)
    print("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
