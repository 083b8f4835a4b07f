"""Real shapes with random weights on one GPU: training and sampling beside transformers + peft, MFU and memory.

    python tests/benchmarks/bench_gpu.py --model Qwen3-8B          # H100 or H200; results/gpu_<model>-cuda-<date>.json
    python tests/benchmarks/bench_gpu.py --model Qwen3-30B-A3B     # needs about 120 GB: an H200
    python tests/benchmarks/bench_gpu.py --quick                   # tiny shapes, one step, also without a GPU

training  forward, backward, clipping and AdamW on `batch` sequences; rank-32 LoRA on all linears and the unembedding
mixed     the same of tinker_hpc, with an adapter of its own (rank `mixed_rank`) for each sequence, in one batch
sampling  `num_prompts` different prompts, one sample of `new_tokens` each, with logprobs
MFU       4 * N * tokens / seconds / peak, N the weights that take part in a token's matrix products (no embedding
          lookup, no norms, no idle experts); 2 N forward and 2 N backward, since the base has no weight gradients.
          Attention's own products are left out, so the true utilisation is a little higher.

The weights files are sparse (zeros that take no room on the disk); after loading, every weight is drawn anew, so that
experts are chosen as evenly as random weights choose. A model with experts runs the batch as two micro-batches: as one,
the planner's memory model says 144 GiB for Qwen3-30B-A3B. A side that runs out of memory is in the record with what it
had measured, and with the allocator's words (`out_of_memory`); `--ours` leaves transformers out.
"""

from __future__ import annotations

import gc
import json
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record

PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}
"""Dense bf16, from the vendor's data sheets, by a word of the device's name; the first that matches."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@dataclass(frozen=True)
class Config:
    model: str
    batch: int = 8
    sequence_length: int = 1024
    token_budget: int = 8192
    lora_rank: int = 32
    mixed_rank: int = 8
    num_prompts: int = 64
    prompt_length: int = 128
    new_tokens: int = 128
    seed: int = 0


SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "num_experts": 8,
    "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip


def write_model(config_json: dict[str, Any], folder: Path) -> Path:
    """A model folder whose weights are one sparse file of zeros, bfloat16, in the checkpoint's own names."""
    from megatron_adapters.expected_tensors import expected_shapes
    from megatron_adapters.families import read_architecture

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json))
    arch, _ = read_architecture(folder)
    header: dict[str, Any] = {}
    position = 0
    for name, shape in expected_shapes(arch).items():
        end = position + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return folder


class Ours:
    """tinker_hpc's engine, one rank."""

    def __init__(self, folder: Path, config: Config) -> None:
        import torch

        from megatron_adapters.engine import Engine, Layout, LoraSpec

        self.engine = Engine.start(folder, Layout(), token_budget=config.token_budget)
        with torch.no_grad():
            for parameter in self.engine.model.gpt.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.02)
                else:
                    parameter.fill_(1.0)  # norms
        self.engine.create_adapter("a", LoraSpec(config.lora_rank, seed=0))
        self.others = [f"mixed-{place}" for place in range(config.batch)]
        for place, name in enumerate(self.others):
            self.engine.create_adapter(name, LoraSpec(config.mixed_rank, seed=place))
        self.engine.snapshot("a", "a")

    def train(self, tokens: np.ndarray) -> None:
        self._train(["a"] * len(tokens), tokens)

    def train_mixed(self, tokens: np.ndarray) -> None:
        self._train(self.others, tokens)

    def _train(self, names: list[str], tokens: np.ndarray) -> None:
        from megatron_adapters.engine import AdamParams, Datum, Pass

        data: dict[str, list[Datum]] = {}
        for name, row in zip(names, tokens, strict=True):
            data.setdefault(name, []).append(Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:]}))
        for outcome in self.engine.run_passes([Pass(name, own, _loss) for name, own in data.items()], backward=True):
            if isinstance(outcome, Exception):
                raise outcome
        for name in data:
            self.engine.optim_step(name, AdamParams(learning_rate=1e-6, grad_clip_norm=1.0))

    def sample(self, prompts: np.ndarray, new_tokens: int) -> int:
        from megatron_adapters.engine import SampleRequest

        requests = [SampleRequest("a", row.astype(np.int32), 1, new_tokens, seed=k) for k, row in enumerate(prompts)]
        results = self.engine.sample(requests)
        return sum(len(sequence.logprobs) for result in results for sequence in result.sequences)

    def stop(self) -> None:
        self.engine.stop()


def _loss(logprobs_T: Any, inputs: Any, segment_ids_T: Any) -> Any:
    return -logprobs_T.sum()


class Theirs:
    """transformers + peft, as their documentation does it."""

    def __init__(self, folder: Path, config: Config) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        hf_config = AutoConfig.from_pretrained(folder)
        with torch.device(self.device):
            base = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa")
        targets = TARGETS if not getattr(hf_config, "num_experts", 0) else [*TARGETS[:4], "lm_head"]
        lora = LoraConfig(r=config.lora_rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, lora)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)
        self.torch = torch

    def train(self, tokens: np.ndarray) -> None:
        torch, ids = self.torch, self.torch.from_numpy(tokens).to(self.device)
        self.model.train()
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sample(self, prompts: np.ndarray, new_tokens: int) -> int:
        torch, ids = self.torch, self.torch.from_numpy(prompts).to(self.device)
        self.model.eval()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new_tokens,
                eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            new = out.sequences[:, ids.shape[1] :]
            for place, logits in enumerate(out.logits):
                torch.log_softmax(logits.float(), -1).gather(1, new[:, place, None])
        return int(new.numel())

    def stop(self) -> None:
        del self.model, self.optimizer, self.trained


def rates(action: Callable[[], Any], tokens: int, warmup: int, repeats: int) -> list[float]:
    """Tokens/s of each repeat; the device has finished when the clock stops."""
    import torch

    found = []
    for repeat in range(-warmup, repeats):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= 0:
            found.append(tokens / (time.perf_counter() - start))
    return found


def measure(side: Any, config: Config, vocab_size: int, *, warmup: int, repeats: int, found: dict[str, Any]) -> None:
    """All numbers of one side, into `found` as they come; sides run one after the other, since two large models do not
    fit a GPU.
    """
    import torch

    random = np.random.default_rng(config.seed)
    tokens = random.integers(3, vocab_size, (config.batch, config.sequence_length + 1), dtype=np.int64)
    prompts = random.integers(3, vocab_size, (config.num_prompts, config.prompt_length), dtype=np.int64)
    count = config.batch * config.sequence_length
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found["training tokens_per_s"] = rates(lambda: side.train(tokens), count, warmup, repeats)
    if torch.cuda.is_available():
        found["training peak_memory_gib"] = [torch.cuda.max_memory_allocated() / 2**30]
    if isinstance(side, Ours):
        found["mixed tokens_per_s"] = rates(lambda: side.train_mixed(tokens), count, warmup, repeats)

    def sample() -> None:
        sampled = side.sample(prompts, config.new_tokens)
        assert sampled == config.num_prompts * config.new_tokens, f"{sampled} tokens sampled"

    found["sampling tokens_per_s"] = rates(sample, config.num_prompts * config.new_tokens, warmup, repeats)


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="tiny shapes, one step, no warm-up", repeats=5, warmup=2)
    parser.add_argument("--model", default="Qwen3-8B", help="a name of tests/models/published_configs.py")
    parser.add_argument("--ours", action="store_true", help="leave transformers + peft out")
    options = parser.parse_args(argv)

    import torch
    from published_configs import PUBLISHED

    from launch.model_sizes import read_sizes

    if not torch.cuda.is_available() and not options.quick:
        raise SystemExit("no GPU here: the real shapes need one. Tiny shapes run anywhere: --quick")
    config_json = PUBLISHED[options.model]
    repeats, warmup = options.repeats, options.warmup
    if options.quick:
        config_json = config_json | {key: value for key, value in SMALL.items() if key in config_json}
        repeats, warmup = 1, 0
    sizes = read_sizes(config_json)
    config = Config(options.model, token_budget=4096 if sizes.num_experts else 8192)
    if options.quick:
        config = Config(options.model, 2, 16, 16, 4, 2, 4, 8, 4)
    flops = sizes.flops_per_trained_token
    facts = {"flops_per_trained_token": flops, "num_active_parameters": sizes.num_active_parameters}
    outcome = record.Outcome(f"gpu_{options.model}", asdict(config) | facts, warmup, repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(config_json, Path(temporary) / "model")
        found: dict[str, dict[str, list[float]]] = {}
        for name, kind in (("tinker_hpc", Ours), *(() if options.ours else (("transformers_peft", Theirs),))):
            found[name], side = {}, None
            try:
                side = kind(folder, config)
                measure(side, config, sizes.vocab_size, warmup=warmup, repeats=repeats, found=found[name])
            except torch.OutOfMemoryError as error:  # the other side's numbers stand all the same
                outcome.config.setdefault("out_of_memory", {})[name] = str(error).splitlines()[0]
                print(f"{name} ran out of memory; measured before: {list(found[name]) or 'nothing'}. {error}")
            if side is not None:
                side.stop()
            side = None
            gc.collect()  # the engine's model is a cycle (recompute.install)
            torch.cuda.empty_cache()
    mixed = found["tinker_hpc"].pop("mixed tokens_per_s", None)
    for key in dict.fromkeys(key for values in found.values() for key in values):
        case, metric = key.split()
        outcome.add(case, metric, {name: values[key] for name, values in found.items() if key in values})
    if mixed is not None:
        outcome.add("mixed", "tokens_per_s", {"mixed": mixed, "one": found["tinker_hpc"]["training tokens_per_s"]})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((tflops for word, tflops in PEAK_TFLOPS.items() if word in device), None)
    trained = {
        name: values["training tokens_per_s"] for name, values in found.items() if "training tokens_per_s" in values
    }
    if peak is not None and trained:
        shares = {name: [100 * flops * rate / (peak * 1e12) for rate in values] for name, values in trained.items()}
        outcome.add("training", "mfu_percent_of_4N", shares)
    print(f"MFU counts {flops:,} FLOPs a trained token: 4 N, N = {flops // 4:,}")
    return outcome.finish(options.results)


if __name__ == "__main__":
    print(main())
