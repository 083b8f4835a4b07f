"""What the whole path costs beside the model: stock SDK, gateway, request log, worker, result log, and back.

    python tests/benchmarks/bench_request_latency.py           # the long form; writes results/request_latency-...json
    python tests/benchmarks/bench_request_latency.py --quick   # one round trip: does it still run?

whole path        forward_backward (1 datum of 16 tokens) and optim_step, pipelined, on tiny-qwen3, one rank; beside the
                  seconds the worker itself logs for computing the two, and what is left
without a model   the same and larger ones against a process that answers every record at once
disk              one file of 1 kB written and fsynced, and its folder fsynced: the path needs four of these in a row
                  (two requests accepted one after the other, two results)
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

WAIT_S = 120


def datums(count: int, length: int) -> list[Any]:
    import tinker

    inputs = {"target_tokens": [7] * length, "weights": [1.0] * length}
    return [tinker.Datum(tinker.ModelInput.from_ints([5] * length), inputs) for _ in range(count)]


def round_trip(client: Any, data: list[Any]) -> None:
    """One training step as a loop would write it: both submitted before either is awaited."""
    import tinker

    passed = client.forward_backward(data, "cross_entropy")
    stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-6))
    passed.result(WAIT_S)
    stepped.result(WAIT_S)


def milliseconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def disk_write(folder: Path, number: int) -> None:
    """What one durable record costs at least."""
    descriptor = os.open(folder / f"probe-{number}", os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(descriptor, bytes(1024))
    os.fsync(descriptor)
    os.close(descriptor)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def compute_ms(worker: Any, first: int) -> list[float]:
    """Milliseconds the worker says it computed for, per pair of requests, from the `first` pair on."""
    from tinker_hpc.log import ResultReader

    reader, times = ResultReader(worker.path), []
    while records := reader.poll():
        times += [
            r.header["compute_s"] * 1e3 for r in records if r.header.get("op") in ("forward_backward", "optim_step")
        ]
    pairs = [a + b for a, b in zip(times[::2], times[1::2], strict=True)]
    return pairs[first:]


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="one round trip, no warm-up, no large calls", repeats=100, warmup=10)
    parser.add_argument(
        "--root", type=Path, help="make the data root below this folder, e.g. to measure another filesystem"
    )
    options = parser.parse_args(argv)
    repeats, warmup = (1, 0) if options.quick else (options.repeats, options.warmup)
    os.environ.update(TINKER_TELEMETRY="0", no_proxy="127.0.0.1", NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="1")

    import serving
    import tinker

    config = {
        "model": "tests/models/tiny-qwen3",
        "lora_rank": 8,
        "ranks": 1,
        "transport": "loopback",
        "bell": "unix socket",
    }
    outcome = record.Outcome("request_latency", config, warmup, repeats)
    with tempfile.TemporaryDirectory(dir=options.root) as temporary:
        folder = Path(temporary)
        (folder / "probe").mkdir()

        def client_of(service: Any) -> Any:
            connected = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
            future = connected.create_lora_training_client(base_model=service.base_model, rank=8, seed=1)
            return future.result(WAIT_S)

        with serving.processes_in(folder) as processes:
            run, worker = serving.new_run(folder / "with-model")
            service = serving.start_gateway(processes, run)
            serving.start_worker(processes, worker)
            client = client_of(service)
            path_ms, disk_ms = [], []
            for number in range(warmup + repeats):
                disk_ms.append(milliseconds(lambda number=number: disk_write(folder / "probe", number)))
                path_ms.append(milliseconds(lambda: round_trip(client, datums(1, 16))))
            model_ms = compute_ms(worker, 0)
            path_ms, disk_ms, model_ms = path_ms[warmup:], disk_ms[warmup:], model_ms[warmup:]
            beyond = [whole - model for whole, model in zip(path_ms, model_ms, strict=True)]
            outcome.add("whole path, 1 x 16 tokens", "round_trip_ms", {"tinker_hpc": path_ms, "model_itself": model_ms})
            outcome.add("whole path, 1 x 16 tokens", "beyond_the_model_ms", {"tinker_hpc": beyond})
            outcome.add("disk, one durable record", "write_ms", {"this_disk": disk_ms})
        with serving.processes_in(folder) as processes:
            run, worker = serving.new_run(folder / "without-model")
            service = serving.start_gateway(processes, run)
            serving.start_responder(processes, worker)
            client = client_of(service)
            calls = {"1 x 16": (1, 16)} if options.quick else {"1 x 16": (1, 16), "64 x 1024": (64, 1024)}
            for name, (count, length) in calls.items():
                data = datums(count, length)
                for _ in range(warmup):
                    round_trip(client, data)
                times = [milliseconds(lambda data=data: round_trip(client, data)) for _ in range(repeats)]
                outcome.add(f"without a model, {name} tokens", "round_trip_ms", {"tinker_hpc": times})
            sampler = client.save_weights_and_get_sampling_client().result(WAIT_S)
            params, prompt = tinker.SamplingParams(max_tokens=4), tinker.ModelInput.from_ints([5, 6])
            times = [milliseconds(lambda: sampler.sample(prompt, 1, params).result(WAIT_S)) for _ in range(repeats)]
            outcome.add("without a model, one sample", "round_trip_ms", {"tinker_hpc": times})
    return outcome.finish(options.results)


if __name__ == "__main__":
    print(main())
