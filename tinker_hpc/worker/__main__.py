"""One rank of a worker: `python -m tinker_hpc.worker --worker-dir DIR`, started by torch's elastic agent.

Exit codes: 0 after `close`; by SIGTERM where it was sent that (parting.py); 1 otherwise, the reason on the last line
of stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.patience import words_may_be_lost
from tinker_hpc.run_folder import WorkerFolder
from tinker_hpc.worker import agent
from tinker_hpc.worker.parting import Parted, Parting, end, leave


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and turn every ending into an exit code with one clear last line."""
    parser = argparse.ArgumentParser(prog="python -m tinker_hpc.worker", description="One rank of a worker.")
    parser.add_argument("--worker-dir", type=Path, required=True, help="the worker's folder, with worker.json")
    folder = WorkerFolder(parser.parse_args(arguments).worker_dir.resolve())
    rank = os.environ.get("RANK", "0")
    # On import megatron-core tells of every optional package it did not find; a run's log has no use for that.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    agent.end_with_agent()
    words_may_be_lost()
    try:
        owner = agent.owner()
        if rank == "0":
            agent.refuse_if_superseded(folder.lease, owner["agent"])  # before torch: seconds of imports for nothing
        from megatron_adapters.adapter_room import AdapterLost
        from tinker_hpc.worker.ranks import EndWorker
        from tinker_hpc.worker.serve import serve

        try:
            serve(folder, owner, Parting())
        except (EndWorker, AdapterLost) as error:
            _fail(f"worker rank {rank} ends: {error}")
        except Parted:
            sys.stdout.flush()
            leave()
    except TinkerHpcError as error:
        _fail(f"worker rank {rank} ends: {error}")
    except Exception as error:
        traceback.print_exc()
        _fail(f"worker rank {rank} ends: {type(error).__name__}: {error}")
    end(0)


def _fail(message: str) -> NoReturn:
    """Leave at once: other ranks may hang in a collective, and leaving the groups in good order would wait for them."""
    print(message, file=sys.stderr, flush=True)
    end(1)


if __name__ == "__main__":
    main()
