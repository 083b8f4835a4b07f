"""A worker without a model: answers every request in the log with numbers made from its header.

For tests and measurements of the gateway alone. Run as `python log_responder.py WORKER_DIR`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tinker_hpc.log import Bell, Lease, LogReader, Record, ResultLog
from tinker_hpc.private_files import write_json
from tinker_hpc.run_folder import WorkerFolder


def respond(request: Record) -> Record | None:
    header = request.header
    op = header["op"]
    if op in ("rejected", "close"):
        return None
    result = {"request_id": header["request_id"], "seq": header["seq"], "op": op, "model_id": header["model_id"]}
    result["ok"] = True
    arrays: dict[str, np.ndarray] = {}
    if op == "forward_backward":
        tokens = request.arrays["tokens"]
        arrays = {"logprobs": -tokens.astype(np.float32), "offsets": request.arrays["offsets"]}
        result["metrics"] = {"loss:sum": float(tokens.sum())}
        result["loss_fn_output_type"] = "ArrayRecord"
    elif op == "optim_step":
        result["metrics"] = {"grad_norm:mean": header["adam"]["learning_rate"]}
    elif op in ("save_state", "save_sampler_weights"):
        for key in ("path", "sampling_session_id"):
            if header.get(key):
                result[key] = header[key]
    elif op == "sample":
        length, count = header["max_tokens"] or 1, header["num_samples"]
        if header["prompt_logprobs"]:
            arrays["prompt_logprobs"] = np.full(request.arrays["prompt"].size, -1.0, np.float32)
            arrays["prompt_logprobs"][0] = np.nan
        arrays["tokens"] = np.arange(length * count, dtype=np.int32)
        arrays["logprobs"] = np.full(length * count, -0.5, np.float32)
        arrays["offsets"] = np.arange(count + 1, dtype=np.int64) * length
        result["stop_reasons"] = ["length"] * count
    return Record(result, arrays)


def main(folder: Path) -> None:
    worker = WorkerFolder(folder)
    reader = LogReader(worker.requests)
    results = ResultLog(folder, Lease.acquire(worker.lease, {"pid": 0, "host": "here"}))
    bell = Bell(folder, side="worker")
    write_json(worker.status, {"phase": "ready", "reason": "", "error": None, "since": 0})
    while True:
        records = reader.poll()
        answers = [answer for answer in map(respond, records) if answer is not None]
        if answers:
            results.publish(answers)
            bell.ring()
        if any(record.header["op"] == "close" for record in records):
            return
        if not records:
            bell.wait(1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
