"""A loss of the user's own on the server, in one pass, beside the same loss beside the loop, in two.

    python tests/benchmarks/bench_custom_loss.py           # the long form; writes results/custom_loss-...json
    python tests/benchmarks/bench_custom_loss.py --quick   # one pass of each: does it still run?

Both sides are the stock SDK's `forward_backward_custom` with one LossHandle (a clipped policy gradient with an entropy
term and a metric) on tiny-qwen3 and one rank; `loss_id=None` is what makes the SDK run it client-side: a forward, the
loss, and a second forward with the backward. Beside them the published loss `ppo`, which does as much in the worker.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record

WAIT_S = 300
RANKS = {"logprobs": 1, "q": 1, "advantages": 1, "mask": 1}


def datums(count: int, length: int) -> tuple[list[Any], list[Any]]:
    """The same data for the custom loss and for ppo."""
    import tinker

    random = np.random.default_rng(0)
    custom, published = [], []
    for _ in range(count):
        tokens = random.integers(3, 1000, length + 1)
        q, advantages = -random.exponential(2.0, length), random.normal(size=length)
        inputs = {
            "target_tokens": tinker.TensorData.from_numpy(tokens[1:]),
            "advantages": tinker.TensorData.from_numpy(advantages.astype(np.float32)),
        }
        sampled, ones = q.astype(np.float32), np.ones(length, np.float32)
        prompt = tinker.ModelInput.from_ints(tokens[:-1].tolist())
        more = {"q": tinker.TensorData.from_numpy(sampled), "mask": tinker.TensorData.from_numpy(ones)}
        custom.append(tinker.Datum(prompt, {**inputs, **more}))
        published.append(tinker.Datum(prompt, {**inputs, "logprobs": tinker.TensorData.from_numpy(sampled)}))
    return custom, published


def milliseconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="one pass of each, no warm-up, small data", repeats=20, warmup=3)
    options = parser.parse_args(argv)
    repeats, warmup = (1, 0) if options.quick else (options.repeats, options.warmup)
    os.environ.update(TINKER_TELEMETRY="0", no_proxy="127.0.0.1", NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="1")

    import custom_losses
    import serving
    import tinker

    sizes = {"4 x 16": (4, 16)} if options.quick else {"16 x 64": (16, 64), "64 x 128": (64, 128)}
    config = {"model": "tests/models/tiny-qwen3", "lora_rank": 8, "ranks": 1, "loss": "clipped_with_entropy"}
    outcome = record.Outcome("custom_loss", config, warmup, repeats)
    with tempfile.TemporaryDirectory() as temporary, serving.processes_in(Path(temporary)) as processes:
        run, worker = serving.new_run(Path(temporary) / "root")
        service = serving.start_gateway(processes, run)
        serving.start_worker(processes, worker)
        connected = tinker.ServiceClient(base_url=service.base_url, api_key=service.api_key)
        future = connected.create_lora_training_client(base_model=service.base_model, rank=8, seed=1)
        client = future.result(WAIT_S)
        handle = connected.create_custom_loss(custom_losses.clipped_with_entropy, RANKS).result(WAIT_S)
        assert handle.loss_id is not None, "this gateway does not run custom losses"
        beside = dataclasses.replace(handle, loss_id=None)
        for name, size in sizes.items():
            custom, published = datums(*size)
            ways: dict[str, Callable[[], Any]] = {
                "on_the_server": lambda d=custom: client.forward_backward_custom(d, handle).result(WAIT_S),
                "beside_the_loop": lambda d=custom: client.forward_backward_custom(d, beside).result(WAIT_S),
                "published_ppo": lambda d=published: client.forward_backward(d, "ppo").result(WAIT_S),
            }
            times: dict[str, list[float]] = {side: [] for side in ways}
            for number in range(warmup + repeats):
                for side, way in ways.items():
                    took = milliseconds(way)
                    if number >= warmup:
                        times[side].append(took)
            outcome.add(f"{name} tokens", "pass_ms", times)
    return outcome.finish(options.results)


if __name__ == "__main__":
    print(main())
