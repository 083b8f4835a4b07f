"""The same Tinker program on tinker_hpc and on SkyRL's JAX server (SkyRL-tx), both on this machine's CPU, interleaved.

    make skyrl-env                                           # once: an environment of its own, .venv-skyrl
    python tests/benchmarks/bench_skyrl.py                   # writes results/skyrl-cpu-<date>.json
    python tests/benchmarks/bench_skyrl.py --quick           # a small model, once

Whole paths: each side's SDK, server, model and back, with as many threads as there are cores on either side, and the
same adapter (attention and MLP: that server does not train the unembedding). The first call of each kind compiles on
SkyRL's side; it is left out of the rates and reported by itself. Not part of make bench.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
from benchmark_model import SMALL, ModelConfig

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SKYRL_PYTHON = ROOT / ".venv-skyrl" / "bin" / "python"
START_S = 300


@dataclass(frozen=True)
class Config(ModelConfig):
    lora_rank: int = 32
    batch: int = 8
    sequence_length: int = 128
    num_prompts: int = 32
    group_prompts: int = 4
    prompt_length: int = 64
    new_tokens: int = 32


QUICK = Config(
    **SMALL, lora_rank=4, batch=2, sequence_length=16, num_prompts=4, group_prompts=2, prompt_length=8, new_tokens=4
)


class Side:
    """A server that runs, and a process that loads it (skyrl/load.py)."""

    def __init__(self, python: Path, base_url: str, api_key: str, base_model: str, config: Config) -> None:
        command = [python, HERE / "skyrl" / "load.py", base_url, api_key, base_model, json.dumps(asdict(config))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self, what: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the program ended: {' '.join(map(str, self.process.args))}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def our_server(folder: Path, model: Path) -> Iterator[tuple[str, str, str]]:
    """Gateway and a worker of one rank: URL, key, model."""
    import serving

    with serving.processes_in(folder, env={"OMP_NUM_THREADS": str(os.cpu_count())}) as processes:
        run, worker = serving.new_run(folder / "ours", model)
        service = serving.start_gateway(processes, run)
        serving.start_worker(processes, worker)
        yield service.base_url, service.api_key, service.base_model


@contextmanager
def their_server(folder: Path, model: Path, lora_rank: int) -> Iterator[tuple[str, str, str]]:
    """SkyRL's API process and the engine it starts, with the fewest adapters it can have."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "port": port,
        "base-model": model,
        "backend": "jax",
        "backend-config": json.dumps({"max_lora_adapters": 2, "max_lora_rank": lora_rank}),
        "database-url": f"sqlite:///{folder}/skyrl.db",
        "checkpoints-base": folder / "checkpoints",
    }
    command = [SKYRL_PYTHON, HERE / "skyrl" / "serve.py", *(x for k, v in options.items() for x in (f"--{k}", str(v)))]
    with (folder / "skyrl.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
    try:
        import serving

        def answers() -> bool:
            if process.poll() is not None:
                raise SystemExit(f"SkyRL's server ended:\n{(folder / 'skyrl.log').read_text()[-4000:]}")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        serving.wait_for(answers, START_S, "SkyRL's server")
        yield f"http://127.0.0.1:{port}", "tml-any", str(model)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str] | None = None) -> Path:
    parser = record.parser(__doc__, quick="a small model, one call after the first", repeats=3)
    options = parser.parse_args(argv)
    if not SKYRL_PYTHON.exists():
        raise SystemExit(f"{SKYRL_PYTHON} is not there. Make SkyRL's environment first: make skyrl-env")
    config, repeats = (QUICK, 1) if options.quick else (Config(), options.repeats)
    os.environ.update(TINKER_TELEMETRY="0", no_proxy="127.0.0.1", NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="1")

    from bench_throughput import check_same_loss

    facts = {"dtype": "float32", "threads": os.cpu_count(), "skyrl": "0.3.0", "backend": "jax, CPU"}
    outcome = record.Outcome("skyrl", asdict(config) | facts, 1, repeats)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        model = config.make(folder, initializer_range=0.05)
        for file in (HERE.parent / "models" / "tiny-qwen3").glob("token*"):  # SkyRL's engine loads a tokenizer
            (model / file.name).write_bytes(file.read_bytes())
        ours = stack.enter_context(our_server(folder, model))
        theirs = stack.enter_context(their_server(folder, model, config.lora_rank))
        sides = {
            "tinker_hpc": Side(Path(sys.executable), *ours, config),
            "skyrl_jax": Side(SKYRL_PYTHON, *theirs, config),
        }
        for side in sides.values():
            stack.callback(side.stop)
        for what, case in {"train": "training", "groups": "sampling, groups", "prompts": "sampling, prompts"}.items():
            first = {name: side.run(what) for name, side in sides.items()}
            if what == "train":
                check_same_loss(first["tinker_hpc"]["loss"], first["skyrl_jax"]["loss"])
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(repeats):
                for name, side in sides.items():
                    answer = side.run(what)
                    rates[name].append(answer["tokens"] / answer["seconds"])
            outcome.add(case, "tokens_per_s", rates)
            outcome.add(case, "first_call_s", {name: [answer["seconds"]] for name, answer in first.items()})
    return outcome.finish(options.results)


if __name__ == "__main__":
    print(main())
