"""Step 5 of a request. Before: worker/loop.py. After: megatron_adapters/engine.py, then worker/publisher.py.

Runs one request other than a sample, on all ranks. Every method here is a collective: every rank calls it with the same
request. A request that fails leaves its model as it was.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_adapters.adapters import Adapter, LoraWeights
from megatron_adapters.engine import Engine
from megatron_adapters.interface import AdamParams, LoraSpec, Pass
from tinker_hpc.errors import RequestError
from tinker_hpc.log import Record
from tinker_hpc.patience import Wait
from tinker_hpc.worker import checkpoint
from tinker_hpc.worker.aside import SnapshotsAside
from tinker_hpc.worker.batch import lora_spec, num_loss_tokens, pass_result, replayed_share, to_data
from tinker_hpc.worker.checkpoint import Checkpoint
from tinker_hpc.worker.custom_loss import CustomLossFn, numbered
from tinker_hpc.worker.losses import bind
from tinker_hpc.worker.metrics import MetricsFile, StepMetrics
from tinker_hpc.worker.ranks import Ranks
from tinker_hpc.worker.sampler_gap import sampler_gap

Answer = tuple[dict[str, Any], Mapping[str, np.ndarray]]
"""Fields and arrays of a result."""
_T = TypeVar("_T")
READ_TRIES = 3
"""Of a checkpoint that another run saves over while it is read."""
SAVE_PATIENCE_S = 300.0
"""A checkpoint that a full disk refuses is tried again for so long, like a request (the SDK's five minutes); a quota
that it does not fit into at all must not hold up everybody for ever."""
MAX_SNAPSHOTS = 16
"""Per model, and of all that were opened by path, in memory, or fewer where all together take too much of it
(megatron_adapters/snapshot_room.py). The one sampled from longest ago is set aside first."""
MAX_ASIDE = 112
"""Per model, on the disk beside those; beyond it the one set aside longest ago is lost. What was opened by path has its
checkpoint there, and is never lost."""


@dataclass
class ModelState:
    """What the worker knows of a model beside its weights, which the engine has. Equal on all ranks."""

    lora: LoraSpec
    step: int = 0
    since_step: StepMetrics = field(default_factory=StepMetrics)


class TrainStep:
    """The models of this worker."""

    def __init__(
        self, engine: Engine, ranks: Ranks, base_model: str, metrics: MetricsFile | None, aside: SnapshotsAside
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._base_model = base_model
        self._metrics = metrics
        self._models: dict[str, ModelState] = {}
        self.samplers: OrderedDict[str, str | None] = OrderedDict()
        """sampling_session_id -> snapshot_id in the engine, None for the base model; most recently used last."""
        self.in_use: Counter[str] = Counter()
        """How many samples are under way, by their samplers: these are not to be dropped."""
        self.taken_back: Set[str] = frozenset()
        """On rank 0: ids of requests that do not count any more; what they saved may be saved over."""
        self._snapshot_of: dict[str, str] = {}
        self._aside = aside
        self._set_aside: dict[str, str] = {}  # sampler: whose snapshot it is, oldest first
        self._evicted: dict[str, str] = {}
        self._opened: dict[str, dict[str, Any]] = {}
        """Samplers opened by path, in memory or not: {"folder", "path", "checkpoint": its identity}."""
        self._operations: dict[str, Callable[[Record], Answer]] = {
            "create_model": self._create_model,
            "optim_step": self._optim_step,
            "save_state": self._save_state,
            "load_state": self._load_state,
            "save_sampler_weights": self._save_sampler_weights,
            "open_sampler": self._open_sampler,
        }

    @property
    def token_budget(self) -> int:
        """Most tokens of a micro-batch, where nothing has run out of memory."""
        return self._engine.token_budget

    def recover_memory(self) -> None:
        """See Engine.recover_memory."""
        self._engine.recover_memory()

    def run(self, request: Record, *, token_budget: int | None = None) -> Answer:
        """Compute one request; `token_budget`: see run_passes.

        Raises: RequestError and its like for a user's mistake, anything else for ours; the same on every rank unless
            a rank fails by itself, which `Ranks.agree` finds out.
        Collectives: those of the engine's method, and of Ranks.on_first for files.
        """
        if request.header["op"] == "forward_backward":
            [outcome] = self.run_passes([request], token_budget=token_budget)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return self._operations[request.header["op"]](request)

    def snapshot_for(self, sampling_session_id: str) -> str | None:
        """The snapshot a sampler reads, brought back to memory where it was set aside.

        Raises: RequestError if it is unknown, made room for newer ones, or cannot be read back; EndWorker if some ranks
            alone cannot read it.
        Collectives: where it was set aside those of SnapshotsAside, or Ranks.on_first and Ranks.on_all.
        """
        if sampling_session_id in self._evicted:
            raise RequestError(
                f"sampler {sampling_session_id} was dropped: {self._evicted[sampling_session_id]} has saved "
                f"{MAX_SNAPSHOTS + MAX_ASIDE} newer snapshots since it was last used. Keep weights with "
                "save_weights_for_sampler(name) and open them by path."
            )
        if sampling_session_id in self._set_aside:
            self._aside.bring_back(sampling_session_id)
            del self._set_aside[sampling_session_id]
            self._keep_in_memory(sampling_session_id)
        if sampling_session_id in self._opened and sampling_session_id not in self.samplers:
            self._open_again(sampling_session_id)
        if sampling_session_id not in self.samplers:
            raise RequestError(
                f"sampler {sampling_session_id!r} is not known to this worker; create a sampling client first"
            )
        self.samplers.move_to_end(sampling_session_id)
        return self.samplers[sampling_session_id]

    @property
    def set_aside(self) -> frozenset[str]:
        """Samplers whose weights are on the disk alone."""
        return frozenset(self._set_aside)

    def state(self) -> dict[str, Any]:
        """What of this a snapshot must hold beside the engine's tensors, as JSON values. On rank 0."""
        self._aside.flush()
        return {
            "models": {model_id: asdict(model) for model_id, model in self._models.items()},
            "samplers": [[sampler, used, self._snapshot_of.get(sampler)] for sampler, used in self.samplers.items()],
            "aside": dict(self._set_aside),
            "evicted": dict(self._evicted),
            "opened": dict(self._opened),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; the engine's tensors are there already."""
        for model_id, model in state["models"].items():
            since_step = StepMetrics(**model["since_step"])
            self._models[model_id] = ModelState(LoraSpec(**model["lora"]), model["step"], since_step)
        for sampler, used, owner in state["samplers"]:
            self.samplers[sampler] = used
            if owner is not None:
                self._snapshot_of[sampler] = owner
        self._set_aside.update(state.get("aside", {}))
        self._snapshot_of.update(self._set_aside)
        self._evicted.update(state["evicted"])
        self._opened.update(state.get("opened", {}))

    def touch(self, sampling_session_ids: Iterable[str]) -> None:
        """These samplers were used, in this order."""
        for sampler in sampling_session_ids:
            if sampler in self.samplers:
                self.samplers.move_to_end(sampler)

    def _create_model(self, request: Record) -> Answer:
        model_id, source = request.header["model_id"], request.header.get("from_state")
        if source is None:
            lora = lora_spec(request.header)
            num_parameters = self._engine.create_adapter(model_id, lora)
            self._models[model_id] = ModelState(lora)
            return {"num_parameters": num_parameters}, {}
        folder, optimizer = Path(source["folder"]), source["optimizer"]

        def read(saved: Checkpoint) -> Adapter:
            return self._engine.read_adapter(folder, optimizer=self._with_optimizer(saved, optimizer))

        saved, adapter = self._read(folder, source["path"], read)
        self._engine.keep_adapter(model_id, adapter)
        self._models[model_id] = ModelState(LoraSpec(**saved.lora), saved.step if optimizer else 0)
        return {"checkpoint": _identity(saved)}, {}

    def run_passes(self, requests: Sequence[Record], *, token_budget: int | None = None) -> list[Answer | Exception]:
        """Compute forward_backward requests of any models in one mixed batch; all forward_only, or none.

        Args: token_budget: of its micro-batches; None: the worker's. Said in the answers, so that redoing them takes
            the same path to the same bits.

        Returns: each one's answer, or why it failed, which fails no other: equal on every rank.
        Raises, collectives: see Engine.run_passes. A group that raises has changed nothing.
        """
        started = time.monotonic()
        backward = not requests[0].header["forward_only"]
        outcomes: dict[int, Answer | Exception] = {}
        passes: dict[int, Pass] = {}
        for index, request in enumerate(requests):
            header = request.header
            try:
                data = to_data(request)
                if header["loss_fn"] == "custom":
                    passes[index] = Pass(header["model_id"], numbered(data), CustomLossFn.of(request))
                else:
                    loss_fn = bind(header["loss_fn"], header.get("loss_fn_config") or {})
                    passes[index] = Pass(header["model_id"], data, loss_fn)
            except Exception as error:
                outcomes[index] = error
        outputs = self._engine.run_passes(list(passes.values()), backward=backward, token_budget=token_budget)
        num_tokens = sum(int(requests[index].arrays["tokens"].size) for index in passes)
        seconds_per_token = (time.monotonic() - started) / max(1, num_tokens)
        for index, output in zip(passes, outputs, strict=True):
            if isinstance(output, Exception):
                outcomes[index] = output
                continue
            request = requests[index]
            gap = sampler_gap(passes[index].data, output.logprobs)
            loss_fn = passes[index].loss_fn
            custom = loss_fn.metrics(output.logprobs) if isinstance(loss_fn, CustomLossFn) else {}
            metrics = output.metrics | gap.metrics() | replayed_share(request) | custom
            fields, arrays = pass_result(replace(output, metrics=metrics))
            outcomes[index] = (fields if token_budget is None else {**fields, "token_budget": token_budget}), arrays
            if backward:
                size = int(request.arrays["tokens"].size)
                self._models[request.header["model_id"]].since_step.add(
                    loss_sum=output.loss_sum,
                    num_loss_tokens=num_loss_tokens(request),
                    num_tokens=size,
                    seconds=seconds_per_token * size,
                    gap=gap,
                )
        return [outcomes[index] for index in range(len(requests))]

    def _optim_step(self, request: Record) -> Answer:
        model_id = request.header["model_id"]
        model = self._models[model_id]
        adam = AdamParams(**request.header["adam"])
        started = time.monotonic()
        metrics = self._engine.optim_step(model_id, adam)
        model.step += 1
        if self._metrics is not None:
            seconds = time.monotonic() - started
            seq = request.header["seq"]
            line = model.since_step.line(model_id, model.step, metrics, adam.learning_rate, seconds, seq=seq)
            self._metrics.append(line)
        model.since_step = StepMetrics()
        return {"metrics": metrics}, {}

    def _save_state(self, request: Record) -> Answer:
        self._save(request, kind="state", optimizer=True)
        return {"path": request.header["path"]}, {}

    def _save_sampler_weights(self, request: Record) -> Answer:
        header = request.header
        if header.get("sampling_session_id") is None:
            self._save(request, kind="sampler", optimizer=False)
            return {"path": header["path"]}, {}
        sampler, model_id = header["sampling_session_id"], header["model_id"]
        self._engine.snapshot(model_id, sampler)
        self._snapshot_of[sampler] = model_id
        self._keep_in_memory(sampler)
        return {"sampling_session_id": sampler}, {}

    def _load_state(self, request: Record) -> Answer:
        header = request.header
        model = self._models[header["model_id"]]
        folder, optimizer = Path(header["folder"]), header["optimizer"]

        def read(saved: Checkpoint) -> Adapter:
            differing = [k for k, v in asdict(model.lora).items() if k != "seed" and saved.lora[k] != v]
            if differing:
                has = ", ".join(f"{k} {saved.lora[k]}" for k in differing)
                wants = ", ".join(f"{k} {getattr(model.lora, k)}" for k in differing)
                raise RequestError(
                    f"{header['path']} has {has}; the model was created with {wants}. "
                    "Use create_training_client_from_state(path), which takes the checkpoint's own settings."
                )
            return self._engine.read_adapter(folder, optimizer=self._with_optimizer(saved, optimizer))

        saved, adapter = self._read(folder, header["path"], read)
        self._engine.keep_adapter(header["model_id"], adapter)
        model.step = saved.step if optimizer else 0
        model.since_step = StepMetrics()
        return {"checkpoint": _identity(saved)}, {}

    def _open_sampler(self, request: Record) -> Answer:
        sampler, source = request.header["sampling_session_id"], request.header["source"]
        if source["type"] == "base":
            self.samplers[sampler] = None
            return {}, {}
        folder = Path(source["folder"])
        saved, weights = self._read(folder, source["path"], lambda _: self._engine.read_snapshot(folder))
        self._engine.keep_snapshot(sampler, weights)
        opened = {"folder": source["folder"], "path": source["path"], "checkpoint": _identity(saved)}
        self._opened[sampler] = opened
        self._keep_in_memory(sampler)
        return {"checkpoint": opened["checkpoint"]}, {}

    def _open_again(self, sampler: str) -> None:
        opened = self._opened[sampler]
        folder, path = Path(opened["folder"]), opened["path"]

        def read(saved: Checkpoint) -> LoraWeights:
            if _identity(saved) != opened["checkpoint"]:
                raise RequestError(f"{path} has been overwritten since.")
            return self._engine.read_snapshot(folder)

        def bring_back() -> None:
            self._engine.keep_snapshot(sampler, self._read(folder, path, read)[1])

        failure = self._ranks.on_all(bring_back)
        if failure is not None and failure.out_of_memory:
            raise MemoryError(failure.message)
        if failure is not None:
            raise RequestError(
                f"sampler {sampler} made room for others that were used since, and cannot be read back: "
                f"{failure.message} Keep what you sample from later under a name of its own."
            )
        self._keep_in_memory(sampler)

    def _save(self, request: Record, *, kind: str, optimizer: bool) -> None:
        header = request.header
        model = self._models[header["model_id"]]
        folder = Path(header["folder"])
        temporary = checkpoint.temporary_folder(folder, header["seq"])
        content = Checkpoint(
            kind=kind,
            path=header["path"],
            model_id=header["model_id"],
            base_model=self._base_model,
            lora=asdict(model.lora),
            step=model.step,
            optimizer=optimizer,
            request_id=header["request_id"],
            age=header.get("age"),
            ttl_seconds=header.get("ttl_seconds"),
            user_metadata=header.get("user_metadata"),
        )
        overwrite = bool(header.get("overwrite"))

        def prepare() -> bool:
            return checkpoint.prepare(
                folder, temporary, request_id=header["request_id"], overwrite=overwrite, taken_back=self.taken_back
            )

        wait = Wait(SAVE_PATIENCE_S)
        while True:
            try:
                if self._ranks.on_first(prepare):
                    self._engine.save_adapter(header["model_id"], temporary, optimizer=optimizer)
                    self._ranks.on_first(lambda: checkpoint.publish(folder, temporary, content))
                return
            except Exception as error:
                if self._ranks.is_first:
                    checkpoint.discard(temporary)
                if not isinstance(error, OSError) or not self._ranks.on_first(functools.partial(wait.once, error)):
                    raise

    def _read(self, folder: Path, path: str, read: Callable[[Checkpoint], _T]) -> tuple[Checkpoint, _T]:
        """A checkpoint, and what `read` made of its files: of this one, also where another run saves over it meanwhile.

        Raises: RequestError: see checkpoint.verify; also where that goes on and on; what `read` raises.
        Collectives: Ranks.on_first, those of `read`.
        """

        def verified() -> dict[str, Any]:
            return asdict(checkpoint.verify(folder, path=path, base_model=self._base_model))

        for _ in range(READ_TRIES):
            saved = Checkpoint(**self._ranks.on_first(verified))
            found = read(saved)
            if self._ranks.on_first(lambda: checkpoint.identity_now(folder)) == _identity(saved):
                return saved, found
            del found  # two may not fit into memory
        raise RequestError(
            f"{path} was saved over while it was read, {READ_TRIES} times in a row. Load it when whoever saves it is "
            "done, or have it saved under a name that is not used again."
        )

    @staticmethod
    def _with_optimizer(saved: Checkpoint, wanted: bool) -> bool:
        if wanted and not saved.optimizer:
            raise RequestError(
                f"{saved.path} holds sampler weights without optimizer state. Load it without the optimizer "
                "(create_training_client_from_state), or load a checkpoint made by save_state."
            )
        return wanted

    def _keep_in_memory(self, sampler: str) -> None:
        """What the engine has now; those used longest ago make room, first of the same owner, then where memory is
        short of any. Those that samples use at this moment stay.
        """
        self.samplers[sampler] = sampler
        owner = self._snapshot_of.get(sampler)
        held = [s for s, used in self.samplers.items() if used is not None]
        own = [s for s in held if self._snapshot_of.get(s) == owner]
        for oldest in [s for s in own[:-MAX_SNAPSHOTS] if s not in self.in_use]:
            self._take_out(oldest)
        others = [s for s in held if s in self.samplers and s not in self.in_use and s != sampler]
        for oldest in others[: self._engine.snapshots_in_excess(others)]:
            self._take_out(oldest)

    def _take_out(self, sampler: str) -> None:
        """Of memory: what was opened by path is on the disk already, a model's is set aside if its copy fits."""
        owner = self._snapshot_of.get(sampler)
        if owner is None:
            self._engine.drop_snapshot(sampler)
            del self.samplers[sampler]
            return
        if not self._aside.put(sampler):
            return
        del self.samplers[sampler]
        self._set_aside[sampler] = owner
        lost = [s for s, whose in self._set_aside.items() if whose == owner]
        for oldest in lost[: max(0, len(lost) - MAX_ASIDE)]:
            self._aside.forget(oldest)
            del self._set_aside[oldest]
            self._evicted[oldest] = owner


def _identity(saved: Checkpoint) -> list[Any]:
    """Recorded with every load, and compared on redo."""
    return checkpoint.identity(asdict(saved))
