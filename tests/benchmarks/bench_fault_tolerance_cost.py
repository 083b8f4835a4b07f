"""What it costs that nothing is lost: logs and snapshots beside a training step, how much a restart redoes, replay.

    python tests/benchmarks/bench_fault_tolerance_cost.py           # results/fault_tolerance_cost-<device>-<date>.json
    python tests/benchmarks/bench_fault_tolerance_cost.py --quick   # a small model, two steps: does it still run?

A real worker (tinker_hpc.worker.serve, one rank), whose training steps are taken in turn

on      as always: two requests (8 sequences of 128 tokens, AdamW) appended to the request log, read, their batches
        recorded, computed, the results durable; snapshots when the clock wants them
off     the same two computed, and nothing written: no log, no snapshot. There is no such mode outside this file

logging         steps without a snapshot, on beside off
snapshots       what a step with one takes longer than its neighbour without logs, less what logging costs, and how
                often the clock chose to pay that
in all          logging, and the snapshots' share of the interval: to be below 1.03
recovery        the longest time since what the newest finished snapshot holds, at the end of any step, beside the
                interval the clock had chosen: a restart recomputes at most that. To be at most 1
replay          a loop of 1,000 steps started again from its beginning, beside recording them (no model)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import record
from benchmark_model import SMALL, ModelConfig

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config(ModelConfig):
    lora_rank: int = 32
    batch: int = 8
    sequence_length: int = 128
    replayed_steps: int = 1000


QUICK = Config(**SMALL, lora_rank=4, batch=2, sequence_length=16, replayed_steps=3)


@dataclass
class Measured:
    """Seconds; `on` and `off` pair by pair."""

    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    with_snapshot: list[bool] = field(default_factory=list)
    unsaved: list[float] = field(default_factory=list)
    """at the end of a step: since when nothing is in a finished snapshot"""
    intervals: list[float] = field(default_factory=list)
    """as chosen then"""


class Alternating:
    """Rank 0's desk, with a step of its own, written nowhere, before each that comes through the logs."""

    def __init__(self, desk: Any, snapshots: Any, under_test: Any, config: Config, steps: int) -> None:
        self._desk = desk
        self._train_step, self._writer = snapshots._train_step, snapshots._writer
        self._under_test = under_test
        self._config = config
        self._steps = steps
        self.measured = Measured()
        self._unfinished = 1  # create_model
        self._on_since: float | None = None
        self._snapshots_before = 0
        self._began = self._saved_up_to = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._desk, name)

    def next_orders(self) -> Any:
        if self._unfinished == 0:
            self._end_step()
            if len(self.measured.on) == self._steps:
                self._under_test.send("close")
            else:
                self._begin_step()
        orders = self._desk.next_orders()
        if orders and orders[0].header.get("snapshot") is not None:
            self._began = time.monotonic()
        return orders

    def finish(self, request: Any, outcome: Any, *, seconds: float | None = None) -> None:
        assert isinstance(outcome, tuple), outcome
        self._unfinished -= 1
        self._desk.finish(request, outcome, seconds=seconds)

    def _requests(self) -> list[Any]:
        config, under_test = self._config, self._under_test
        length = config.batch * config.sequence_length
        tokens = np.random.default_rng(config.seed).integers(3, config.vocab_size, length + 1, dtype=np.int32)
        fields = under_test.pass_fields("m:0", 0)
        fields["arrays"] = {
            "tokens": tokens[:-1].copy(),
            "offsets": np.arange(0, length + 1, config.sequence_length, dtype=np.int64),
            "input.target_tokens": tokens[1:].astype(np.int64),
            "input.weights": np.ones(length, dtype=np.float32),
        }
        adam = under_test.adam(learning_rate=1e-5, grad_clip_norm=1.0)
        return [under_test.request(**fields), under_test.request("optim_step", model_id="m:0", adam=adam)]

    def _begin_step(self) -> None:
        requests = self._requests()
        for number, request in enumerate(requests):
            request.header["seq"] = -2 * len(self.measured.off) - number - 1
        started = time.perf_counter()
        for request in requests:
            self._train_step.run(request)
        self.measured.off.append(time.perf_counter() - started)
        under_test = self._under_test
        for name in under_test.next_seq_id:
            under_test.next_seq_id[name] -= len(requests)  # those were never sent
        requests = self._requests()
        self._snapshots_before = self._writer._number
        self._unfinished = len(requests)
        self._on_since = time.perf_counter()
        for request in requests:
            under_test.append(request)

    def _end_step(self) -> None:
        if self._on_since is None:
            return
        self._desk.flush()
        self.measured.on.append(time.perf_counter() - self._on_since)
        self.measured.with_snapshot.append(self._writer._number > self._snapshots_before)
        thread = self._writer._thread
        if thread is None or not thread.is_alive():
            self._saved_up_to = self._began
        self.measured.unsaved.append(time.monotonic() - self._saved_up_to)
        self.measured.intervals.append(self._writer._interval_s)
        if thread is not None:  # or it would be paid by the step without
            thread.join()
            self._saved_up_to = self._began


def run_worker(folder: Path, model_folder: Path, config: Config, steps: int) -> tuple[Measured, list[dict[str, Any]]]:
    """The times, and what the worker logged of its snapshots."""
    from worker_driver import WorkerUnderTest

    from tinker_hpc.worker import serve as serving_rank
    from tinker_hpc.worker.parting import Parting

    made: list[Alternating] = []
    worker = folder / "worker"
    worker.mkdir(mode=0o700)
    under_test = WorkerUnderTest(worker, model_folder)

    class FirstRank(serving_rank._FirstRank):
        def desk(self, layout: Any, snapshots: Any, parting: Any) -> Any:
            made.append(Alternating(super().desk(layout, snapshots, parting), snapshots, under_test, config, steps))
            return made[0]

    serving_rank._FirstRank = FirstRank
    try:
        under_test.create_model("m:0", rank=config.lora_rank)
        serving_rank.serve(under_test.folder, {"agent": "benchmark", "host": "here", "pid": os.getpid()}, Parting())
        under_test.poll()
    finally:
        under_test.stop()
    return made[0].measured, [r.header for r in under_test.records if r.header["op"] == "snapshot"]


def replay(folder: Path, steps: int) -> tuple[float, float]:
    """Seconds to record a loop's steps (nothing computes), and to be given them again."""
    import serving

    def run(service: Any) -> float:
        env = {**os.environ, "TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
        program = HERE.parent / "contract" / "replayed_program.py"
        argv = [sys.executable, str(program), service.base_model, json.dumps({"steps": steps})]
        printed = subprocess.run(argv, env=env, capture_output=True, check=True).stdout.splitlines()
        return json.loads(printed[-1])["at"] - json.loads(printed[0])["at"]

    with serving.processes_in(folder) as processes:
        new, worker = serving.new_run(folder / "root")
        new.begin_loop()
        service = serving.start_gateway(processes, new)
        serving.start_responder(processes, worker)
        recorded_s = run(service)
        processes.stop("gateway", kill=True)
        new.begin_loop()
        return recorded_s, run(serving.start_gateway(processes, new))


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="a small model, two steps", repeats=40, warmup=2)
    options = parser.parse_args(argv)
    config = QUICK if options.quick else Config()
    repeats, warmup = (2, 0) if options.quick else (options.repeats, options.warmup)
    os.environ.update(HF_HUB_OFFLINE="1", TINKER_TELEMETRY="0", no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")

    outcome = record.Outcome("fault_tolerance_cost", asdict(config) | {"dtype": "float32"}, warmup, repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_folder = config.make(folder, initializer_range=0.05)
        measured, snapshots = run_worker(folder, model_folder, config, warmup + repeats)
        (folder / "replay").mkdir()
        recorded_s, replayed_s = replay(folder / "replay", config.replayed_steps)

    pairs = list(zip(measured.on, measured.off, measured.with_snapshot, strict=True))[warmup:]
    calm = [(on, off) for on, off, snapshot in pairs if not snapshot] or [pairs[0][:2]]
    sides = {"on": [on * 1e3 for on, _ in calm], "off": [off * 1e3 for _, off in calm]}
    outcome.add("logging", "step_time_ms", sides)
    extra = statistics.median(on - off for on, off in calm)
    ratio = outcome.metrics["logging"]["step_time_ms"]["ratio_on_to_off"]["median"]
    longer = [on - off - extra for on, off, snapshot in pairs if snapshot]
    interval_s = measured.intervals[-1]
    if snapshots and longer:
        outcome.add("snapshots", "step_longer_ms", {"each": [seconds * 1e3 for seconds in longer]})
        outcome.add("snapshots", "training_stands_still_ms", {"each": [s["blocked_s"] * 1e3 for s in snapshots]})
        outcome.add("snapshots", "write_ms", {"each": [s["write_s"] * 1e3 for s in snapshots]})
        outcome.add("snapshots", "interval_s", {"chosen": [s["interval_s"] for s in snapshots]})
        ratio += max(0.0, statistics.median(longer)) / interval_s
    outcome.add("in all", "step_time_ratio", {"on_to_off": [ratio]})
    unsaved = zip(measured.unsaved, measured.intervals, strict=True)
    worst = max(unsaved, key=lambda pair: pair[0] / pair[1])
    outcome.add("recovery, at most", "redone_s", {"redone": [worst[0]], "interval": [worst[1]]})
    outcome.add(
        f"replay of {config.replayed_steps} steps", "loop_s", {"replayed": [replayed_s], "recorded": [recorded_s]}
    )
    return outcome.finish(options.results)


if __name__ == "__main__":
    print(main())
