"""sft_loop.py that rests after each new step, not while it replays. Prints one JSON object.

steady_loop.py BASE_MODEL STEPS PAUSE_S
"""

from __future__ import annotations

import json
import sys
import time

from paced_loop import note_of_run
from sft_loop import main

if __name__ == "__main__":
    newest, pause_s = note_of_run("step"), float(sys.argv[3])

    def rest(step: int) -> None:
        if step > int(newest.read_text() if newest.exists() else -1):
            newest.write_text(str(step))
            time.sleep(pause_s)

    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), rest=rest)))
