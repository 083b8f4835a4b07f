"""sft_loop.py from a notebook: the loop here, the worker in a job. Prints one JSON object.

session_sft.py BASE_MODEL STEPS PAUSE_S
"""

from __future__ import annotations

import json
import sys

import sft_loop

import tinker_hpc

if __name__ == "__main__":
    base_model, steps, pause_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    with tinker_hpc.session(
        base_model=base_model, cluster="test", gpus_per_node=0, memory="2G", time=10, name="notebook-sft"
    ) as service:
        value = sft_loop.main(base_model, steps, pause_s, service)
    print(json.dumps(value))
