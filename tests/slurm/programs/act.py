"""One thing a user does with tinker_hpc, from a process of its own, as after a new login. Prints one JSON object.

act.py submit '{"base_model": ..., "resources": {...}, ...}' COMMAND...
act.py status|result|cancel RUN_ID
act.py resume RUN_ID '{"resources": {...}, "cluster": ...}'
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tinker_hpc.errors import TinkerHpcError
from tinker_hpc.resources import Resources
from tinker_hpc.resume import resume as resume_run
from tinker_hpc.runs import Run
from tinker_hpc.submission import submit_loop


def submit(options: str, *command: str) -> dict[str, Any]:
    """Submit a command as the loop of a run."""
    asked = json.loads(options)
    started = time.monotonic()
    run = submit_loop(
        base_models=[asked["base_model"], *asked.get("further_base_models", [])],
        cluster=asked.get("cluster", "test"),
        resources=Resources(**{"gpus_per_node": 0, "time": 5, **asked.get("resources", {})}),
        name=asked.get("name", "test"),
        command=command,
        driver=asked.get("driver", "together"),
    )
    return {"run_id": run.id, "job_id": run.status().job_id, "seconds": time.monotonic() - started}


def status(run_id: str) -> dict[str, Any]:
    """How a run is doing."""
    return Run(run_id).status().to_json()


def result(run_id: str) -> dict[str, Any]:
    """Wait for a run to end."""
    value = Run(run_id).result(timeout=180)
    return {"value": value}


def cancel(run_id: str) -> dict[str, Any]:
    """End a run."""
    Run(run_id).cancel()
    return {}


def resume(run_id: str, options: str = "{}") -> dict[str, Any]:
    """Go on with a run that ended."""
    asked = json.loads(options)
    run = resume_run(run_id, cluster=asked.get("cluster"), resources=Resources(**asked.get("resources", {})))
    return {"run_id": run.id, "job_ids": list(run.status().job_ids)}


ACTIONS = {"submit": submit, "status": status, "result": result, "cancel": cancel, "resume": resume}

if __name__ == "__main__":
    began = time.monotonic()
    try:
        answer = ACTIONS[sys.argv[1]](*sys.argv[2:])
    except TinkerHpcError as error:
        answer = {"error": type(error).__name__, "message": str(error), **{k: v for k, v in error.attributes.items()}}
    print(json.dumps({"took_s": time.monotonic() - began, **answer}, default=str))
