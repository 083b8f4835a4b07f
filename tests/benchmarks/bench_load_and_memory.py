"""Load time and peak memory of one training step, beside transformers + peft: a process of its own for every number.

    python tests/benchmarks/bench_load_and_memory.py           # results/load_and_memory-<device>-<date>.json
    python tests/benchmarks/bench_load_and_memory.py --quick   # small model, once

load         from "libraries are imported" to "model and adapter are ready", files in the page cache
peak memory  resident set (VmHWM) on a CPU, allocated memory on a GPU: the most while one step is taken after loading,
             in 4 sequences of 512 tokens
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record
from benchmark_model import SMALL, ModelConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@dataclass(frozen=True)
class Config(ModelConfig):
    lora_rank: int = 32
    batch: int = 4
    sequence_length: int = 512


QUICK = Config(**SMALL, lora_rank=4, batch=2, sequence_length=16)


def ours(folder: Path, config: Config, tokens: np.ndarray) -> tuple[float, Any]:
    """Seconds to load, and the step."""
    from megatron_adapters.engine import AdamParams, Datum, Engine, Layout, LoraSpec

    started = time.perf_counter()
    engine = Engine.start(folder, Layout())
    engine.create_adapter("a", LoraSpec(config.lora_rank, seed=0))
    loaded_s = time.perf_counter() - started
    data = [Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:]}) for row in tokens]

    def step() -> None:
        engine.run_pass("a", data, lambda logprobs_T, inputs, segment_ids_T: -logprobs_T.sum(), backward=True)
        engine.optim_step("a", AdamParams())

    return loaded_s, step


def theirs(folder: Path, config: Config, tokens: np.ndarray) -> tuple[float, Any]:
    """The same with transformers + peft, as their documentation does it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    started = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    lora = LoraConfig(r=config.lora_rank, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    loaded_s = time.perf_counter() - started
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.from_numpy(tokens).to(device)

    def step() -> None:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    return loaded_s, step


def measure(side: str, folder: Path, config: Config) -> None:
    """What a child process does: prints {"load_s", "peak_memory_gib"}."""
    import peft  # noqa: F401  # imported before the clock starts, on both sides
    import torch
    import transformers  # noqa: F401
    from peak_memory import resident_bytes

    import megatron_adapters.engine  # noqa: F401

    random = np.random.default_rng(config.seed)
    tokens = random.integers(3, config.vocab_size, (config.batch, config.sequence_length + 1), dtype=np.int64)
    loaded_s, step = {"tinker_hpc": ours, "transformers_peft": theirs}[side](folder, config, tokens)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    step()
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    print(json.dumps({"load_s": loaded_s, "peak_memory_gib": peak / 2**30}))


def main(argv: list[str] | None = None) -> Path | None:
    parser = record.parser(__doc__, quick="a small model, once", repeats=5)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    config = QUICK if options.quick else Config()
    if options.side:
        measure(options.side, options.model, config)
        return None

    repeats = 1 if options.quick else options.repeats
    outcome = record.Outcome("load_and_memory", asdict(config), 0, repeats)
    found: dict[str, dict[str, list[float]]] = {"load_s": {}, "peak_memory_gib": {}}
    with tempfile.TemporaryDirectory() as folder:
        model_folder = config.make(Path(folder))
        for _ in range(repeats):
            for side in ("tinker_hpc", "transformers_peft"):
                command = [sys.executable, __file__, "--side", side, "--model", str(model_folder)]
                command += ["--quick"] if options.quick else []
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{side} failed:\n{done.stderr}")
                for metric, value in json.loads(done.stdout.splitlines()[-1]).items():
                    found[metric].setdefault(side, []).append(value)
    for metric, sides in found.items():
        outcome.add("one process", metric, sides)
    return outcome.finish(options.results)


if __name__ == "__main__":
    written = main()
    if written is not None:
        print(written)
