"""How far sampled logprobs are from the trainer's of the same tokens and weights: what an RL loop's importance ratio
has of numerics alone. Beside transformers + peft: logprobs along `generate` and along its forward for training.

    python tests/benchmarks/bench_sampler_gap.py           # writes results/sampler_gap-<device>-<date>.json
    python tests/benchmarks/bench_sampler_gap.py --quick   # a small model

4 prompts, 8 samples of each, at temperature 1, in float32 and in bfloat16 (weights and activations; adapters float32).
Nats of |trainer - sampler|, over all sampled tokens; what is better is smaller.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import bench_throughput
import numpy as np
import record
from bench_throughput import QUICK, Config, Theirs


def our_gaps(model: Path, adapter: Path, prompts: list[np.ndarray], config: Config, dtype: str) -> np.ndarray:
    from megatron_adapters.engine import Datum, Engine, Layout, SampleRequest

    engine = Engine.start(model, Layout(), dtype=dtype)
    engine.load_adapter("a", adapter, optimizer=False)
    engine.load_snapshot("a", adapter)
    samples = config.num_prompts // config.group_prompts
    results = engine.sample([SampleRequest("a", x, samples, config.new_tokens, seed=k) for k, x in enumerate(prompts)])
    pairs = [(prompt, x) for prompt, result in zip(prompts, results, strict=True) for x in result.sequences]
    whole = [np.concatenate([prompt, x.tokens]) for prompt, x in pairs]
    data = [Datum(x[:-1], {"target_tokens": x[1:].astype(np.int64)}) for x in whole]
    # With gradients: without, the trainer would run the sampler's layers.
    trained = engine.run_pass("a", data, lambda logprobs_T, *_: -logprobs_T.sum(), backward=True).logprobs
    engine.stop()
    return np.concatenate([found[-len(x.tokens) :] - x.logprobs for (_, x), found in zip(pairs, trained, strict=True)])


def their_gaps(theirs: Theirs, prompts: list[np.ndarray], config: Config) -> np.ndarray:
    torch, model = theirs.torch, theirs.model.eval()
    torch.manual_seed(0)
    ids = torch.from_numpy(np.stack(prompts).astype(np.int64))
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=config.num_prompts // config.group_prompts, max_new_tokens=config.new_tokens,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = out.sequences[:, ids.shape[1] :]
        sampled = torch.stack(
            [x.float().log_softmax(-1).gather(1, new[:, k, None])[:, 0] for k, x in enumerate(out.logits)], 1
        )
        logits = model.train()(input_ids=out.sequences[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
        trained = logits.float().log_softmax(-1).gather(2, new[:, :, None])[:, :, 0]
    return (trained - sampled).numpy().ravel()


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="a small model", repeats=1)
    options = parser.parse_args(argv)
    config = QUICK if options.quick else Config()
    bench_throughput.CONFIG = config

    outcome = record.Outcome("sampler_gap", asdict(config), 0, options.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        model, adapter = config.make(Path(temporary), initializer_range=0.05), Path(temporary) / "adapter"
        theirs = Theirs(model, adapter)
        random = np.random.default_rng(config.seed)
        for dtype in ("float32", "bfloat16"):
            theirs.model.to(getattr(theirs.torch, dtype))
            gaps: dict[str, list[np.ndarray]] = {"tinker_hpc": [], "transformers_peft": []}
            for _ in range(options.repeats):
                shape = (config.group_prompts, config.prompt_length)
                prompts = list(random.integers(3, config.vocab_size, shape, dtype=np.int32))
                gaps["tinker_hpc"].append(our_gaps(model, adapter, prompts, config, dtype))
                gaps["transformers_peft"].append(their_gaps(theirs, prompts, config))
            for metric, figure in {"mean_nats": np.mean, "largest_nats": np.max}.items():
                found = {side: [float(figure(np.abs(np.concatenate(gap))))] for side, gap in gaps.items()}
                outcome.add(dtype, metric, found)
    return outcome.finish(options.results)


if __name__ == "__main__":
    print(main())
