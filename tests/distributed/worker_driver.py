"""Drives real worker processes through the logs alone, as the gateway would: the other half of the record contract."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from tinker_hpc.log import Bell, Record, RequestLog, ResultReader
from tinker_hpc.private_files import read_json, write_json
from tinker_hpc.run_folder import WorkerFolder

BASE_MODEL = "random/qwen3"
ADAM = {
    "learning_rate": 1e-2,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}


def random_base(folder: Path, **overrides: Any) -> Path:
    """A tiny random Qwen3 (see tests/models/random_models.py)."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
    import random_models

    return random_models.make("qwen3", folder, **overrides)


@dataclass
class WorkerUnderTest:
    """A worker folder, the gateway's side of its logs, and the processes of its ranks."""

    path: Path
    base_model_folder: Path
    layout: dict[str, Any] = field(default_factory=lambda: {"tp_size": 1, "dp_size": 1})
    elastic: bool = False
    """Ranks started by torch's elastic agent, which restarts them."""
    snapshot_interval_s: float | None = None
    """0: a snapshot whenever the last one is written and something has changed."""
    hang_floor_s: float | None = None
    """How long computing may stand still at least before a rank counts as hung; None: as everywhere."""

    def __post_init__(self) -> None:
        self.folder = WorkerFolder(self.path)
        if not self.folder.declaration.exists():  # else a later worker on the same folder
            self.folder.create(base_model=BASE_MODEL, base_model_folder=str(self.base_model_folder))
        self._declare()
        self.log = RequestLog(self.folder.requests)
        self.reader = ResultReader(self.path)
        self.bell = Bell(self.path, side="gateway")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.records: list[Record] = []
        self.results: dict[int, list[Record]] = {}
        self.num_requests = 0
        self.next_seq_id: dict[str, int] = {}

    def _declare(self) -> None:
        declaration = read_json(self.folder.declaration)
        assert declaration is not None
        changes = {"layout": self.layout, "snapshot_interval_s": self.snapshot_interval_s}
        changes |= {"hang_floor_s": self.hang_floor_s}
        write_json(self.folder.declaration, declaration | changes)

    @property
    def world_size(self) -> int:
        return int(self.layout["tp_size"] * self.layout["dp_size"] * self.layout.get("pp_size", 1))

    @property
    def stderr(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.path.glob("rank-*.err")))

    def start(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        module = ["tinker_hpc.worker", "--worker-dir", str(self.path)]
        if self.elastic:
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.world_size}"]
            # As launch/children.py: restarted ranks must not find the addresses of dead ones in the agent's store.
            env |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
            self._spawn([*command, "--max-restarts=3", "-m", *module], env, 0)
            return
        # The parent holds the store, as torch's elastic agent does, so no port is guessed.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world_size, "MASTER_PORT": self.store.port}
            extra = {name: str(value) for name, value in ranks.items()}
            extra |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            self._spawn(["-m", *module], env | (extra if self.world_size > 1 else {}), rank)

    def _spawn(self, arguments: list[str], env: dict[str, str], rank: int) -> None:
        with (self.path / f"rank-{rank}.err").open("ab") as err:
            self.processes.append(subprocess.Popen([sys.executable, *arguments], env=env, stdout=err, stderr=err))

    def send(
        self, op: str, *, model_id: str | None = None, arrays: dict[str, np.ndarray] | None = None, **fields: Any
    ) -> int:
        """Append one request with the model's next seq_id (or the one given) and ring; returns its `seq`."""
        return self.append(self.request(op, model_id=model_id, arrays=arrays, **fields))

    def append(self, record: Record) -> int:
        seq = self.log.append([record])[0]
        self.bell.ring()
        return seq

    def request(
        self, op: str, *, model_id: str | None = None, arrays: dict[str, np.ndarray] | None = None, **fields: Any
    ) -> Record:
        self.num_requests += 1
        header = {"op": op, "model_id": model_id, "request_id": f"r{self.num_requests}", "accepted_at": time.time()}
        if model_id is not None and op != "create_model" and "seq_id" not in fields:
            fields["seq_id"] = self.next_seq_id[model_id] = self.next_seq_id.get(model_id, 0) + 1
        return Record(header | {"digest": "", "seq_id": None} | fields, arrays or {})

    def result(self, seq: int, timeout_s: float = 200.0) -> Record:
        """Wait for the result of a request. Fails with the worker's own words if it ends first."""
        deadline = time.monotonic() + timeout_s
        while seq not in self.poll():
            if time.monotonic() > deadline:
                raise AssertionError(f"no result of request {seq} after {timeout_s} s\n{self.stderr}")
            if self.processes and all(p.poll() is not None for p in self.processes):
                raise AssertionError(f"the worker ended without a result of request {seq}\n{self.stderr}")
            self.bell.wait(0.2)
        return self.results[seq][0]

    def poll(self) -> dict[int, list[Record]]:
        """All results so far, by `seq` of the request."""
        while new := self.reader.poll():
            for record in new:
                self.records.append(record)
                if "ok" in record.header:
                    self.results.setdefault(record.header["seq"], []).append(record)
        return self.results

    def ok(self, seq: int, timeout_s: float = 200.0) -> Record:
        """The result of a request that must have succeeded."""
        result = self.result(seq, timeout_s)
        assert result.header["ok"], result.header
        return result

    def wait_for_batch_of(self, seq: int) -> None:
        """Until the worker says that it has begun with a request."""
        deadline = time.monotonic() + 60
        while not any(seq in record.header.get("seqs", ()) for record in self.records):
            assert time.monotonic() < deadline, self.stderr
            self.poll()
            time.sleep(0.005)

    def wait_for_exit(self, timeout_s: float = 120.0) -> list[int]:
        return [process.wait(timeout_s) for process in self.processes]

    def stop(self) -> None:
        """Kill what is left; only processes started here."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.bell.close()
        self.log.close()

    # ---- requests

    def create_model(self, model_id: str, *, rank: int = 4, seed: int = 1) -> int:
        lora = {"rank": rank, "seed": seed, "train_mlp": True, "train_attn": True, "train_unembed": True}
        return self.send("create_model", model_id=model_id, base_model=BASE_MODEL, lora=lora)

    def forward_backward(self, model_id: str, seed: int = 0, *, forward_only: bool = False, **fields: Any) -> int:
        return self.send(**self.pass_fields(model_id, seed, forward_only=forward_only), **fields)

    def pass_fields(self, model_id: str, seed: int, *, forward_only: bool = False) -> dict[str, Any]:
        """Two ragged datums of random tokens."""
        rng = np.random.default_rng(seed)
        offsets = np.array([0, 9, 24], dtype=np.int64)
        tokens = rng.integers(0, 256, 25, dtype=np.int32)
        arrays = {
            "tokens": tokens[:-1].copy(),
            "offsets": offsets,
            "input.target_tokens": tokens[1:].astype(np.int64),
            "input.weights": np.ones(24, dtype=np.float32),
        }
        return {
            "op": "forward_backward",
            "model_id": model_id,
            "arrays": arrays,
            "loss_fn": "cross_entropy",
            "loss_fn_config": {},
            "forward_only": forward_only,
            "input_keys": ["target_tokens", "weights"],
            "trailing_shapes": {"target_tokens": [], "weights": []},
        }

    def optim_step(self, model_id: str, **adam: float) -> int:
        return self.send("optim_step", model_id=model_id, adam=self.adam(**adam))

    @staticmethod
    def adam(**changes: float) -> dict[str, float]:
        return ADAM | changes

    def sample(self, sampler: str, *, seed: int = 0, max_tokens: int = 8, **fields: Any) -> int:
        defaults = {
            "num_samples": 1,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "top_k": -1,
            "top_p": 1.0,
            "seed": seed,
            "stop": {"type": "none", "values": []},
            "prompt_logprobs": False,
        }
        arrays = {"arrays": {"prompt": np.arange(3, 11, dtype=np.int32)}}
        return self.send("sample", sampling_session_id=sampler, **(arrays | defaults | fields))
