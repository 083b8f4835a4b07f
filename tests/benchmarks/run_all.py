"""The benchmarks of a CPU one after the other, then the table of their results: make bench. At most ten minutes.

    python tests/benchmarks/run_all.py            # writes results/*.json and results/README.md
    python tests/benchmarks/run_all.py --quick    # one step of small models; writes nothing into results/

One thread a process, unless OMP_NUM_THREADS says otherwise, so that the numbers of two machines mean the same thing.
Not among them: bench_gpu.py, which needs a GPU, and bench_skyrl.py, which needs an environment of its own (--help says
how to run each), and bench_fault_tolerance_cost.py, which takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table

HERE = Path(__file__).parent
REPEATS = {
    "throughput": 5,
    "sampler_gap": 1,
    "many_adapters": 5,
    "load_and_memory": 3,
    "request_latency": 100,
    "custom_loss": 10,
}
"""Benchmark -> repeats, chosen so that each takes two or three minutes at most on two cores."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="do they still run?")
    quick = parser.parse_args(argv).quick
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        how = ["--quick", "--results", folder] if quick else []
        for name, repeats in REPEATS.items():
            begun = time.monotonic()
            command = [sys.executable, str(HERE / f"bench_{name}.py"), *(how or ["--repeats", str(repeats)])]
            print(f"-- {name}", flush=True)
            subprocess.run(command, check=True, env=environment)
            print(f"-- {name}: {time.monotonic() - begun:.0f} s", flush=True)
    if not quick:
        table.main()
    print(f"-- all: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
