"""`tinker-hpc serve` whose job waits in the queue: what the gateway is told, and what is left after SIGTERM.

serve_and_stop.py BASE_MODEL CLUSTER. Prints one JSON object.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main(base_model: str, cluster: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tinker_hpc.cli", "serve", "--base-model", base_model, "--cluster", cluster]
    began = time.monotonic()
    with subprocess.Popen([*argv, "--gpus-per-node", "0", "--json"], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        line = json.loads(client.stdout.readline())
        answered_s = time.monotonic() - began
        folder = Path.home() / "tinker_hpc_data" / "runs" / line["session_id"]
        status_file = folder / "workers" / "0" / "status.json"
        deadline = time.monotonic() + 60
        while not (status_file.exists() and "BeginTime" in status_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        waiting = json.loads(status_file.read_text())
        client.send_signal(signal.SIGTERM)
        code = client.wait(timeout=60)
    left = subprocess.run(["pgrep", "-f", "-a", line["session_id"]], capture_output=True, text=True, check=False).stdout
    return {
        "run_id": line["session_id"],
        "job_id": json.loads((folder / "submitted.json").read_text())["job_id"],
        "answered_s": answered_s,
        "waiting": waiting,
        "exit_code": code,
        "phase": json.loads(status_file.read_text())["phase"],
        "left": left,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
