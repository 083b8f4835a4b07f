"""Step 6 of a request. Before: tinker_hpc/worker/. After: model.py.

The engine is one rank's handle on the base model, its adapters and its snapshots. Every public method is a
collective: all ranks call it with equal arguments in the same order. Arguments are checked on every rank before
anything is communicated, so a bad one raises everywhere and nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tinker_hpc.errors import RequestError, ShapeError

from . import adapter_files, runtime, training_state
from .adapter_files import HostCopy
from .adapter_room import AdapterRoom, memory_for_adapters
from .adapters import Adapter, LoraWeights
from .data_checks import check_data
from .decode import Admit, Decoder, OnFinished
from .families import check_layout, read_architecture
from .grad_sync import gradient_norm, sum_gradients
from .interface import AdamParams, Datum, Layout, LoraSpec, LossFn, ModelInfo, Pass, PassOutput
from .model import Model
from .optimizer import step_
from .out_of_memory import give_memory_back
from .parameter_count import check_count, check_counts
from .pass_group import run_together
from .projections import attention_names, parameters_per_rank, projections, target_names
from .sample_request import SampledSequence, SampleRequest, SampleResult
from .sampler import make_decoder
from .snapshot_room import memory_for_snapshots, num_in_excess

__all__ = [
    "AdamParams",
    "Datum",
    "Engine",
    "HostCopy",
    "Layout",
    "LoraSpec",
    "LossFn",
    "ModelInfo",
    "Pass",
    "PassOutput",
    "SampleRequest",
    "SampleResult",
    "SampledSequence",
]

TOKEN_BUDGET = 4096
"""Tokens of a micro-batch. Activations are kept for the backward: about 0.15 MB a token and layer at hidden 4096 in
bfloat16."""


class Engine:
    """Trains and serves LoRA adapters on one frozen base. Build it with `Engine.start`.

    Attributes:
        info: facts of the base model. global_rank, world_size: this process.
        adapters: by id; their tensors may be elsewhere (adapter_room.py), so reach them through the methods.
        control_group: gloo over all ranks, for the caller's own broadcasts of CPU data.
        model, runtime: for sampling (decode.py).
    """

    def __init__(self, model: Model, base_model_folder: Path, token_budget: int) -> None:
        arch = model.arch
        self.model = model
        self.runtime = model.runtime
        self.base_model_folder = base_model_folder
        self.token_budget = token_budget
        self.info = ModelInfo(
            model_type=arch.model_type,
            vocab_size=arch.vocab_size,
            max_context=arch.max_context,
            num_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            eos_token_ids=arch.eos_token_ids,
            num_experts=0 if arch.experts is None else arch.experts.count,
            expert_layers=len(arch.expert_layers),
            experts_per_token=0 if arch.experts is None else arch.experts.top_k,
        )
        self.global_rank = self.runtime.global_rank
        self.world_size = self.runtime.layout.world_size
        self.control_group = self.runtime.control_group
        self.adapters: dict[str, Adapter] = {}
        self.room = AdapterRoom(self.runtime.device, memory_for_adapters(self.runtime.device))
        self.snapshots: dict[str, LoraWeights] = {}
        self._most_snapshot_bytes: int | None = None
        self._decoder: Decoder | None = None

    @classmethod
    def start(
        cls,
        base_model_folder: Path,
        layout: Layout,
        *,
        dtype: str | None = None,
        token_budget: int = TOKEN_BUDGET,
        recompute: bool = False,
    ) -> Engine:
        """Join the other ranks (torchrun's environment; none means one process) and load this rank's shard.

        Args:
            dtype: "float32" or "bfloat16"; None means bfloat16 on CUDA and float32 on CPU.
            token_budget: most tokens of a micro-batch, but for a single longer sequence.
            recompute: keep only each layer's input for the backward and compute the rest again: a third more time. Of
                sequences longer than token_budget that is done in any case.
        Raises: ConfigError for a model or layout that cannot run, WeightsError for a checkpoint that does not fit or
            adapters whose parameters are not as many as Tinker's table says (parameter_count.py); all before any
            communication or memory is spent.
        Collectives: creation of the process groups.
        """
        arch, hf_config = read_architecture(base_model_folder)
        check_layout(arch, layout)
        check_counts(arch, layout)
        ranks = runtime.start(layout, dtype)
        model = Model(ranks, arch, hf_config, base_model_folder, recompute=recompute)
        return cls(model, base_model_folder, token_budget)

    def stop(self) -> None:
        """Leave the process groups; the engine is of no use afterwards."""
        self.room.close()
        runtime.stop()

    # ---- adapters

    def create_adapter(self, adapter_id: str, spec: LoraSpec) -> int:
        """New adapter: A drawn from the seed, B zero. Returns the number of trainable parameters.

        Raises: RequestError if the id is taken, the rank is below 1 or nothing would be trained.
        Collectives: none.
        """
        if adapter_id in self.adapters:
            raise RequestError(f"an adapter {adapter_id!r} exists already. Use another id, or drop it first.")
        if spec.rank < 1:
            raise RequestError(f"LoRA rank {spec.rank} is not possible. Use 1 or more; powers of two are usual.")
        switches = {
            "train_attn": spec.train_attn,
            "train_mlp": spec.train_mlp,
            "train_unembed": spec.train_unembed,
        }
        if not any(switches.values()):
            raise RequestError("train_attn, train_mlp and train_unembed are all false. Set at least one of them.")
        targets = target_names(**switches, attention=attention_names(self.model.arch))
        adapter = self._new_adapter(spec.rank, spec.alpha, targets, per_expert=spec.per_expert)
        built = (self.runtime.place.pp_rank, adapter.num_parameters)
        check_count(self.model.arch, self.runtime.layout, spec.rank, switches, per_expert=spec.per_expert, built=built)
        adapter.initialize(spec.seed)
        self.keep_adapter(adapter_id, adapter)
        return spec.rank * parameters_per_rank(self.model.arch, **switches, per_expert=spec.per_expert)

    def drop_adapter(self, adapter_id: str) -> None:
        """Forget an adapter and free its memory. Collectives: none."""
        if adapter_id not in self.adapters:
            raise self._unknown(adapter_id)
        del self.adapters[adapter_id]
        self.room.remove(adapter_id)

    def save_adapter(self, adapter_id: str, folder: Path, *, optimizer: bool) -> None:
        """Write PEFT's files, and with `optimizer` the Adam state, into `folder`; see adapter_files.save.

        Gradients of passes since the last optimizer step are not saved.
        """
        adapter = self._adapter(adapter_id)
        base_model = str(self.base_model_folder)
        arch = self.model.arch
        adapter_files.save(adapter, self.runtime, arch, folder, optimizer=optimizer, base_model=base_model)

    def load_adapter(self, adapter_id: str, folder: Path, *, optimizer: bool) -> None:
        """Create the adapter from `folder`, or replace it: weights, rank, targets; pending gradients are dropped.

        Without `optimizer` the Adam state starts anew.
        Raises: WeightsError, leaving an existing adapter as it was. Collectives: none.
        """
        self.keep_adapter(adapter_id, self.read_adapter(folder, optimizer=optimizer))

    def read_adapter(self, folder: Path, *, optimizer: bool) -> Adapter:
        """What `load_adapter` reads, for `keep_adapter`. Raises: WeightsError. Collectives: none."""
        config = adapter_files.read_config(folder, self.model.arch)
        adapter = self._new_adapter(config.rank, config.alpha, config.targets, per_expert=config.per_expert)
        adapter_files.load(adapter, self.model.arch, folder, optimizer=optimizer)
        return adapter

    def keep_adapter(self, adapter_id: str, adapter: Adapter) -> None:
        """Create the adapter from what was read, or replace it. Collectives: none."""
        self.adapters[adapter_id] = adapter
        self.room.add(adapter_id, adapter)

    # ---- the whole state, for a worker that is started again

    def copy_adapter(self, adapter_id: str) -> HostCopy:
        """Weights, optimizer state and pending gradients, on rank 0. Collectives: see training_state.copy_adapter."""
        adapter = self._adapter(adapter_id)
        return training_state.copy_adapter(
            adapter, self.runtime, self.model.arch, base_model=str(self.base_model_folder)
        )

    def restore_adapter(self, adapter_id: str, folder: Path, *, same_layout: bool) -> None:
        """Create the adapter from what `copy_adapter(...).write(folder)` wrote, under this layout or another.

        Raises: WeightsError. Collectives: none.
        """
        self.load_adapter(adapter_id, folder, optimizer=True)
        training_state.restore_gradients(self.adapters[adapter_id], folder, self.runtime, same_layout=same_layout)

    def copy_snapshot(self, snapshot_id: str) -> HostCopy:
        """A snapshot's matrices, on rank 0; written, they are a folder for `load_snapshot`. Collectives: see
        training_state.copy_snapshot.
        """
        weights = self.snapshots[snapshot_id]
        base_model = str(self.base_model_folder)
        return training_state.copy_snapshot(weights, self.model.arch, self.runtime, base_model=base_model)

    def forget(self) -> None:
        """Drop every adapter and snapshot; the base model stays. Collectives: none."""
        for adapter_id in self.adapters:
            self.room.remove(adapter_id)
        self.adapters.clear()
        self.snapshots.clear()

    # ---- snapshots, for sampling

    def snapshot(self, adapter_id: str, snapshot_id: str) -> None:
        """Keep an immutable copy of the adapter's weights as they are now. Collectives: none."""
        self.snapshots[snapshot_id] = self._adapter(adapter_id).lora.snapshot(self.runtime.dtype)

    def load_snapshot(self, snapshot_id: str, folder: Path) -> None:
        """Snapshot from an adapter's folder. Raises: WeightsError. Collectives: none."""
        self.keep_snapshot(snapshot_id, self.read_snapshot(folder))

    def read_snapshot(self, folder: Path) -> LoraWeights:
        """What `load_snapshot` reads, for `keep_snapshot`. Raises: WeightsError. Collectives: none."""
        arch = self.model.arch
        config = adapter_files.read_config(folder, arch)
        return adapter_files.load_snapshot(folder, arch, config, self.runtime, self.model.layers)

    def keep_snapshot(self, snapshot_id: str, weights: LoraWeights) -> None:
        """Collectives: none."""
        self.snapshots[snapshot_id] = weights

    def drop_snapshot(self, snapshot_id: str) -> None:
        """Forget a snapshot. Collectives: none."""
        if self.snapshots.pop(snapshot_id, None) is None:
            raise RequestError(f"no snapshot {snapshot_id!r}. Known: {', '.join(self.snapshots) or 'none'}.")

    def snapshots_in_excess(self, oldest_first: Sequence[str]) -> int:
        """How many of these snapshots, from the first, to drop for all that there are to stay within their memory
        (snapshot_room.py). Collectives: one all-reduce over the control group: the most that any rank says.
        """
        if self._most_snapshot_bytes is None:  # as the cache is planned: into what is free when it is first asked for
            self._most_snapshot_bytes = memory_for_snapshots(self.runtime.device)
        number = torch.tensor(num_in_excess(self.snapshots, oldest_first, self._most_snapshot_bytes))
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control_group)
        return int(number.item())

    def sample(
        self,
        requests: Sequence[SampleRequest],
        on_finished: OnFinished | None = None,
        admit: Admit | None = None,
        *,
        max_live: int | None = None,
    ) -> list[SampleResult]:
        """Answer sampling requests, batched across prompts and snapshots; see `Decoder.run`.

        `on_finished(index, result)` is called on every rank as each is answered; `admit()` may bring in more between
        steps, and must return equal requests on every rank. A request that cannot be served has `error` set. With
        `on_finished` nothing is returned.
        """
        if self._decoder is None:  # at the first use: the cache is planned into what the weights left free
            self._decoder = make_decoder(self.model, self.snapshots, self.base_model_folder)
        return self._decoder.run(requests, on_finished, admit, max_live=max_live)

    def recover_memory(self) -> None:
        """After an operation that ran out of memory: free what it held and what can be had again. Collectives: none."""
        self._free_idle_cache()
        give_memory_back()

    def cancel_sample(self, index: int, reason: str) -> None:
        """From `admit` of a running `sample`, on every rank: give up the request with this place in order of arrival.

        It is answered with `reason` as its error before the next step, unless it is finished.
        """
        assert self._decoder is not None
        self._decoder.cancel(index, reason)

    # ---- training

    def run_pass(self, adapter_id: str, data: Sequence[Datum], loss_fn: LossFn, *, backward: bool) -> PassOutput:
        """One pass by itself; see run_passes. Raises: what run_passes gives as the pass's failure."""
        [outcome] = self.run_passes([Pass(adapter_id, data, loss_fn)], backward=backward)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def run_passes(
        self, passes: Sequence[Pass], *, backward: bool, token_budget: int | None = None
    ) -> list[PassOutput | Exception]:
        """Logprobs of the target tokens and the summed loss of each pass; with `backward` its gradients are added to
        its adapter's. Passes of any adapters are mixed in micro-batches.

        A pass counts wholly or not at all. One that fails is given as its exception, the same on every rank, and the
        others as if it had not been there: RequestError or ShapeError for data that cannot be run, before anything is
        computed; RequestError if the loss of a backward pass is not finite; whatever its loss_fn raises.

        Args: token_budget: of this group's micro-batches, instead of the engine's.
        Raises: what the model raises (memory), which concerns no pass in particular; no gradient is changed then.
        Collectives: see training_pass.py; the number of micro-batches differs between data-parallel ranks unless they
            share experts, which is why gradients wait for optim_step. At the end the results are summed over all ranks
            on the CPU. After a failed backward pass the others run once more.
        """
        outcomes: dict[int, PassOutput | Exception] = {}
        for index, one in enumerate(passes):
            try:
                if one.adapter_id not in self.adapters:
                    raise self._unknown(one.adapter_id)
                check_data(one.data, self.info)
            except (RequestError, ShapeError) as error:
                outcomes[index] = error
        self._free_idle_cache()
        while left := [index for index in range(len(passes)) if index not in outcomes]:
            together = [passes[index] for index in left]
            adapters = {one.adapter_id: self.adapters[one.adapter_id] for one in together}
            self.room.use(adapters.keys())
            results = run_together(self.model, together, adapters, token_budget or self.token_budget, backward=backward)
            if results.failures and backward:  # what they left in the gradients is gone; the others begin again
                outcomes |= {left[place]: error for place, error in results.failures.items()}
                continue
            for place, index in enumerate(left):
                outcomes[index] = results.failures.get(place) or results.output(place)
        return [outcomes[index] for index in range(len(passes))]

    def optim_step(self, adapter_id: str, adam: AdamParams) -> dict[str, float]:
        """One AdamW step on the gradients accumulated since the last one; then they are zero.

        Returns: {"grad_norm:mean": global norm before clipping}; 0 without gradients, which is a legal step.
        Raises: RequestError if the norm is not finite; weights and Adam state stay as they were, the gradients go.
        Collectives: see grad_sync.py.
        """
        adapter = self._adapter(adapter_id)
        sum_gradients(adapter, self.runtime)
        norm = gradient_norm(adapter, self.runtime)
        if not np.isfinite(norm):
            adapter.zero_grad()
            raise RequestError(
                f"the gradient norm of adapter {adapter_id!r} is {norm}, so this step was not taken; the weights are "
                "unchanged and the gradients dropped. Look for NaN or infinite loss inputs, or lower the learning rate."
            )
        step_(adapter, adam, norm)
        return {"grad_norm:mean": norm}

    # ---- checks

    def _new_adapter(self, rank: int, alpha: float, targets: tuple[str, ...], *, per_expert: bool) -> Adapter:
        self._free_idle_cache()
        wanted = projections(self.model.arch, targets, per_expert=per_expert, layers=self.model.layers)
        return Adapter(
            wanted,
            rank=rank,
            alpha=alpha,
            targets=targets,
            per_expert=per_expert,
            layout=self.runtime.layout,
            place=self.runtime.place,
            device=self.runtime.device,
        )

    def _adapter(self, adapter_id: str) -> Adapter:
        """The adapter, its state on the device."""
        if adapter_id not in self.adapters:
            raise self._unknown(adapter_id)
        if self.room.is_away(adapter_id):
            self._free_idle_cache()
        self.room.use([adapter_id])
        return self.adapters[adapter_id]

    def _free_idle_cache(self) -> None:
        """Sampling's cache makes room for what is about to be allocated; the next sample takes it anew. Not where next
        to nothing is: a step or a save between two samples would cost the cache.
        """
        if self._decoder is not None:
            self._decoder.release_memory()

    def _unknown(self, adapter_id: str) -> RequestError:
        return RequestError(f"no adapter {adapter_id!r}. Known: {', '.join(self.adapters) or 'none'}.")
