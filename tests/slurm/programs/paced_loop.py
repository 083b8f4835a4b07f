"""sft_loop.py at a pace: step k is not taken before k * PACE_S after the *run* began. Prints one JSON object.

paced_loop.py BASE_MODEL STEPS PACE_S

A loop that is started again is handed its recorded answers without resting between them: under a time limit of a
minute, one that rests again while it replays would never come to anything new.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from sft_loop import main


def note_of_run(what: str) -> Path:
    """A file for all starts of this run's loop; the key of a run's gateway is the same in all its jobs."""
    run = hashlib.sha256(os.environ["TINKER_API_KEY"].encode()).hexdigest()[:16]
    return Path.home() / f".{what}-{run}"


def began_at() -> float:
    """When this run's loop was started first (unix seconds)."""
    path = note_of_run("pace")
    if not path.exists():
        path.write_text(str(time.time()))
    return float(path.read_text())


if __name__ == "__main__":
    began, pace_s = began_at(), float(sys.argv[3])
    told = main(
        sys.argv[1],
        int(sys.argv[2]),
        rest=lambda step: time.sleep(max(0.0, began + (step + 1) * pace_s - time.time())),
    )
    print(json.dumps(told))
