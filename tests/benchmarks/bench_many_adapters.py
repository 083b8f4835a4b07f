"""Eight adapters of different rank in one batch, beside one adapter at equal tokens, in one process, interleaved.

    python tests/benchmarks/bench_many_adapters.py           # writes results/many_adapters-<device>-<date>.json
    python tests/benchmarks/bench_many_adapters.py --quick   # one step of a small model: does it still run?

Training: every side takes one step (forward, backward, clipping, AdamW for each adapter) on the same eight sequences of
128 tokens. Sampling: every side draws 64 tokens after each of the same 32 prompts of 64 tokens, with logprobs. All
adapters are on every linear layer and the unembedding.

mixed        eight adapters (ranks 1, 8, 32, 64, twice), an eighth of the sequences each, computed together
one          one adapter of rank 32 with all sequences
one by one   the same eight adapters, one after the other
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record
from benchmark_model import SMALL, ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    lora_ranks: tuple[int, ...] = (1, 8, 32, 64, 1, 8, 32, 64)
    one_rank: int = 32
    sequence_length: int = 128
    num_prompts: int = 32
    prompt_length: int = 64
    new_tokens: int = 64


QUICK = Config(
    **SMALL,
    lora_ranks=(1, 4, 8),
    one_rank=4,
    sequence_length=16,
    num_prompts=6,
    prompt_length=8,
    new_tokens=4,
)


class Sides:
    """The engine with all adapters, and the three ways to take a step."""

    def __init__(self, model_folder: Path, config: Config) -> None:
        from megatron_adapters.engine import AdamParams, Datum, Engine, Layout, LoraSpec

        self.engine = Engine.start(model_folder, Layout())
        self.adam = AdamParams(learning_rate=1e-5, grad_clip_norm=1.0)
        self.names = [f"rank-{rank}-{place}" for place, rank in enumerate(config.lora_ranks)]
        for name, rank in zip(self.names, config.lora_ranks, strict=True):
            self.engine.create_adapter(name, LoraSpec(rank, seed=1))
        self.engine.create_adapter("one", LoraSpec(config.one_rank, seed=1))
        random = np.random.default_rng(config.seed)
        rows = random.integers(3, config.vocab_size, (len(self.names), config.sequence_length + 1), dtype=np.int64)
        weights = np.ones(config.sequence_length, dtype=np.float32)
        self.data = [Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:], "weights": weights}) for row in rows]
        self.num_tokens = rows[:, :-1].size
        self.prompts = random.integers(3, config.vocab_size, (config.num_prompts, config.prompt_length), dtype=np.int32)
        self.new_tokens = config.new_tokens
        for name in (*self.names, "one"):
            self.engine.snapshot(name, name)

    def mixed(self) -> None:
        from megatron_adapters.engine import Pass

        passes = [Pass(name, [datum], cross_entropy) for name, datum in zip(self.names, self.data, strict=True)]
        for outcome in self.engine.run_passes(passes, backward=True):
            if isinstance(outcome, Exception):
                raise outcome
        for name in self.names:
            self.engine.optim_step(name, self.adam)

    def one(self) -> None:
        self.engine.run_pass("one", self.data, cross_entropy, backward=True)
        self.engine.optim_step("one", self.adam)

    def one_by_one(self) -> None:
        for name, datum in zip(self.names, self.data, strict=True):
            self.engine.run_pass(name, [datum], cross_entropy, backward=True)
            self.engine.optim_step(name, self.adam)

    def sample(self, samplers: list[str]) -> None:
        """One sample of every prompt; equal numbers of neighbouring prompts with each of the samplers."""
        from megatron_adapters.engine import SampleRequest

        share = len(self.prompts) // len(samplers)
        requests = [
            SampleRequest(samplers[place // share], prompt, 1, self.new_tokens, seed=place)
            for place, prompt in enumerate(self.prompts)
        ]
        for result in self.engine.sample(requests):
            assert result.error is None and len(result.sequences[0].tokens) == self.new_tokens, result

    def sample_one_by_one(self) -> None:
        from megatron_adapters.engine import SampleRequest

        share = len(self.prompts) // len(self.names)
        for place, name in enumerate(self.names):
            prompts = self.prompts[place * share : (place + 1) * share]
            self.engine.sample([SampleRequest(name, prompt, 1, self.new_tokens, seed=place) for prompt in prompts])


def cross_entropy(logprobs_T: Any, inputs: Any, segment_ids_T: Any) -> Any:
    return -(logprobs_T * inputs["weights"]).sum()


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="one step of a small model, no warm-up", repeats=9, warmup=2)
    options = parser.parse_args(argv)
    config = QUICK if options.quick else Config()
    repeats, warmup = (1, 0) if options.quick else (options.repeats, options.warmup)

    from bench_throughput import timed

    outcome = record.Outcome("many_adapters", asdict(config) | {"dtype": "float32"}, warmup, repeats)
    with tempfile.TemporaryDirectory() as folder:
        model_folder = config.make(Path(folder), initializer_range=0.05)
        sides = Sides(model_folder, config)
        cases = {
            "training step, eight adapters": (
                sides.num_tokens,
                {"mixed": sides.mixed, "one": sides.one, "one by one": sides.one_by_one},
            ),
            "sampling, eight adapters": (
                config.num_prompts * config.new_tokens,
                {
                    "mixed": lambda: sides.sample(sides.names),
                    "one": lambda: sides.sample(["one"]),
                    "one by one": sides.sample_one_by_one,
                },
            ),
        }
        for case, (num_tokens, actions) in cases.items():
            rates: dict[str, list[float]] = {side: [] for side in actions}
            for repeat in range(-warmup, repeats):
                for side, action in actions.items():
                    seconds = timed(action)
                    if repeat >= 0:
                        rates[side].append(num_tokens / seconds)
            outcome.add(case, "tokens_per_s", rates)
        sides.engine.stop()
    return outcome.finish(options.results)


if __name__ == "__main__":
    print(main())
