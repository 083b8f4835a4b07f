"""Training and sampling tokens/s beside transformers + peft, in one process, interleaved.

    python tests/benchmarks/bench_throughput.py           # writes results/throughput-<device>-<date>.json
    python tests/benchmarks/bench_throughput.py --quick   # one step of a small model: does it still run?

Both sides hold the same random Qwen3 and the same rank-32 adapter on all linear layers and the unembedding.

training          forward, backward, clipping and AdamW on 8 sequences of 128 tokens
sampling, groups  4 prompts, 8 samples of each, 64 tokens per sample, with the logprob of each (as GRPO samples)
sampling, prompts 32 different prompts, one sample of 64 tokens each, with logprobs
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
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
    batch: int = 8
    sequence_length: int = 128
    num_prompts: int = 32
    group_prompts: int = 4
    prompt_length: int = 64
    new_tokens: int = 64


QUICK = Config(
    **SMALL, lora_rank=4, batch=2, sequence_length=16, num_prompts=4, group_prompts=2, prompt_length=8, new_tokens=4
)


class Ours:
    """tinker_hpc's engine, one rank."""

    def __init__(self, model_folder: Path, adapter_folder: Path) -> None:
        from megatron_adapters.engine import Engine, Layout

        self.engine = Engine.start(model_folder, Layout())
        self.engine.load_adapter("a", adapter_folder, optimizer=False)
        self.engine.load_snapshot("a", adapter_folder)

    def train(self, tokens: np.ndarray) -> float:
        from megatron_adapters.engine import AdamParams, Datum

        def cross_entropy(logprobs_T: Any, inputs: Any, segment_ids_T: Any) -> Any:
            return -(logprobs_T * inputs["weights"]).sum()

        weights = np.ones(tokens.shape[1] - 1, dtype=np.float32)
        data = [Datum(row[:-1], {"target_tokens": row[1:].astype(np.int64), "weights": weights}) for row in tokens]
        loss = self.engine.run_pass("a", data, cross_entropy, backward=True).loss_sum
        self.engine.optim_step("a", AdamParams(learning_rate=1e-5, grad_clip_norm=1.0))
        return loss

    def sample(self, prompts: list[np.ndarray], num_samples: int, new_tokens: int, seed: int) -> int:
        from megatron_adapters.engine import SampleRequest

        results = self.engine.sample(
            [
                SampleRequest("a", prompt, num_samples, new_tokens, seed=seed + place)
                for place, prompt in enumerate(prompts)
            ]
        )
        return sum(len(sequence.logprobs) for result in results for sequence in result.sequences)


class Theirs:
    """transformers + peft, as their documentation does it."""

    def __init__(self, model_folder: Path, adapter_folder: Path) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.torch = torch
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
        config = LoraConfig(r=CONFIG.lora_rank, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(1)
        trained = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                trained.append(parameter)
                if "lora_B" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
        self.model.save_pretrained(str(adapter_folder), save_embedding_layers=False)
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)

    def train(self, tokens: np.ndarray) -> float:
        torch = self.torch
        self.model.train()
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def sample(self, prompts: list[np.ndarray], num_samples: int, new_tokens: int, seed: int) -> int:
        torch = self.torch
        self.model.eval()
        torch.manual_seed(seed)
        ids = torch.from_numpy(np.stack(prompts).astype(np.int64))
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=num_samples,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new = out.sequences[:, ids.shape[1] :]
            logprobs = [
                torch.log_softmax(logits, -1).gather(1, new[:, place, None])[:, 0]
                for place, logits in enumerate(out.logits)
            ]
        return sum(step.numel() for step in logprobs)


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(
    ours: Callable[[int], Any], theirs: Callable[[int], Any], tokens: int, warmup: int, repeats: int
) -> dict[str, list[float]]:
    """Tokens/s of each side, one value a repeat."""
    rates: dict[str, list[float]] = {"tinker_hpc": [], "transformers_peft": []}
    for repeat in range(-warmup, repeats):
        for side, action in (("tinker_hpc", ours), ("transformers_peft", theirs)):
            seconds = timed(lambda action=action, repeat=repeat: action(repeat + warmup))
            if repeat >= 0:
                rates[side].append(tokens / seconds)
    return rates


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="one step of a small model, no warm-up", repeats=7, warmup=1)
    parser.add_argument("--only", choices=["training", "sampling"], help="one half; for profiling")
    options = parser.parse_args(argv)
    global CONFIG  # noqa: PLW0603
    CONFIG = QUICK if options.quick else Config()
    repeats, warmup = (1, 0) if options.quick else (options.repeats, options.warmup)

    outcome = record.Outcome("throughput", asdict(CONFIG) | {"dtype": "float32"}, warmup, repeats)
    with tempfile.TemporaryDirectory() as folder:
        model_folder = CONFIG.make(Path(folder), initializer_range=0.05)
        theirs = Theirs(model_folder, Path(folder) / "adapter")
        ours = Ours(model_folder, Path(folder) / "adapter")
        random = np.random.default_rng(CONFIG.seed)

        def tokens(rows: int, length: int) -> np.ndarray:
            return random.integers(3, CONFIG.vocab_size, (rows, length), dtype=np.int32)

        if options.only != "sampling":
            rows = tokens(CONFIG.batch, CONFIG.sequence_length + 1)
            check_same_loss(ours.train(rows), theirs.train(rows))
            count = CONFIG.batch * CONFIG.sequence_length
            rates = interleaved(lambda _: ours.train(rows), lambda _: theirs.train(rows), count, warmup, repeats)
            outcome.add("training", "tokens_per_s", rates)
        if options.only != "training":
            samples = CONFIG.num_prompts // CONFIG.group_prompts
            cases = {"sampling, groups": (CONFIG.group_prompts, samples), "sampling, prompts": (CONFIG.num_prompts, 1)}
            for case, (num_prompts, num_samples) in cases.items():
                prompts = list(tokens(num_prompts, CONFIG.prompt_length))
                count = CONFIG.num_prompts * CONFIG.new_tokens

                def run(side: Any, repeat: int, prompts=prompts, num_samples=num_samples, count=count) -> None:
                    sampled = side.sample(prompts, num_samples, CONFIG.new_tokens, repeat)
                    assert sampled == count, f"{sampled} tokens sampled, {count} asked for"

                rates = interleaved(
                    lambda repeat, run=run: run(ours, repeat), lambda repeat, run=run: run(theirs, repeat),
                    count, warmup, repeats,
                )  # fmt: skip
                outcome.add(case, "tokens_per_s", rates)
        ours.engine.stop()
    return outcome.finish(options.results)


def check_same_loss(ours: float, theirs: float) -> None:
    """Both sides must be computing the same thing, or a ratio of their speeds means nothing."""
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise SystemExit(f"the losses differ: {ours} (ours) and {theirs} (transformers + peft)")


if __name__ == "__main__":
    print(main())
