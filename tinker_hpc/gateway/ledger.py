"""Everything the gateway knows of what it accepted, built from request headers alone.

`apply` takes a header the moment it is accepted, and every header of the log after a restart: one way in, so that a
restarted gateway knows exactly what the first one knew. Lives on the event loop: no locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinker_hpc.gateway.answers import facts_of, failure
from tinker_hpc.gateway.completions import target_of
from tinker_hpc.gateway.futures import Future, FutureTable
from tinker_hpc.gateway.seeds import Age


@dataclass(slots=True)
class ModelState:
    """One model (an adapter in training).

    Attributes:
        lora: {rank, seed, train_mlp, train_attn, train_unembed, per_expert}.
        next_seq: the lowest seq_id that has not arrived; the worker can run nothing from there on.
        early: seq_ids that arrived beyond it.
        born: the age of the state it was made from.
        age: what its samplers are told apart by where the server draws a seed.
    """

    model_id: str
    session_id: str
    worker_index: int
    lora: dict[str, Any]
    user_metadata: dict[str, Any] | None
    created_at: float
    last_request_at: float
    next_seq: int = 1
    early: set[int] = field(default_factory=set)
    born: str = "0.0"
    age: Age = field(default_factory=Age)

    def arrived(self, seq_id: int, at: float) -> bool:
        """Note a request in the model's order. False: it had arrived before."""
        self.last_request_at = max(self.last_request_at, at)
        new = seq_id >= self.next_seq and seq_id not in self.early
        if new:
            self.early.add(seq_id)
        while self.next_seq in self.early:
            self.early.remove(self.next_seq)
            self.next_seq += 1
        return new


@dataclass(frozen=True, slots=True)
class SamplerState:
    """One sampler: the base model (`model_path` and `model_id` None), a checkpoint or an in-memory snapshot.

    `label`: what it is called where a seed is drawn (seeds.py).
    """

    sampling_session_id: str
    worker_index: int
    model_path: str | None
    model_id: str | None
    label: str = ""


class Ledger:
    """Futures, models and samplers."""

    def __init__(self) -> None:
        self.futures = FutureTable()
        self.models: dict[str, ModelState] = {}
        self.samplers: dict[str, SamplerState] = {}
        self.refused_models: dict[str, str] = {}
        self.closed = False
        self.closed_at: dict[int, list[int]] = {}
        """By worker: `seq` of its `close` records."""
        self.rewinds_told: dict[int, set[int]] = {}
        """By worker: numbers of the rewinds its log speaks of."""
        self._taken_back: dict[str, set[str]] = {}

    def request_id(self, base: str) -> str:
        """The id under which a request is known that its client numbers so: another one after it was taken back."""
        times = len(self._taken_back.get(base, ()))
        return base if times == 0 else f"{base}~{times}"

    def enter(self, header: Mapping[str, Any], worker_index: int) -> Future:
        """Reserve the request id while the record is on its way to the disk."""
        is_sample = "sample" in (header["op"], header.get("asked"))
        future = Future(
            request_id=header["request_id"],
            op=header["op"],
            model_id=header.get("model_id"),
            seq_id=header.get("seq_id"),
            worker_index=worker_index,
            digest=header["digest"],
            facts=facts_of(header),
            target=target_of(header["sampling_session_id"], header["seq_id"]) if is_sample else None,
            num_samples=header.get("num_samples") or 0,
            accepted_at=header.get("accepted_at") or 0.0,
            loop_start=header.get("loop_start") or 0,
        )
        self.futures.add(future)
        return future

    def apply(self, header: Mapping[str, Any], worker_index: int) -> None:
        """The record is durable: what it says is so."""
        op, model_id = header["op"], header.get("model_id")
        if op == "close":
            self.closed = True
            if "seq" in header:
                self.closed_at.setdefault(worker_index, []).append(header["seq"])
            return
        if op == "rewind":
            self.rewinds_told.setdefault(worker_index, set()).add(header["number"])
            return
        if header["request_id"] not in self.futures:
            self.enter(header, worker_index)
        if "seq" in header and (future := self.futures.get(header["request_id"])) is not None:
            future.seq = future.seq or header["seq"]
        seq_id = header.get("seq_id")
        sampler = header.get("sampling_session_id")
        label = sampler
        if op == "create_model":
            born = (header.get("from_state") or {}).get("age") or "0.0"
            # setdefault: a record written twice (its first write was reported as failed) is one request.
            self.models.setdefault(
                header["model_id"],
                ModelState(
                    model_id=header["model_id"],
                    session_id=header["session_id"],
                    worker_index=worker_index,
                    lora=dict(header["lora"]),
                    user_metadata=header.get("user_metadata"),
                    created_at=header["accepted_at"],
                    last_request_at=header["accepted_at"],
                    born=born,
                    age=Age(born),
                ),
            )
        elif model_id in self.models and seq_id is not None:
            model = self.models[model_id]
            if model.arrived(seq_id, header["accepted_at"]):
                label = f"{model_id}@{model.age.note(header)}"
        if sampler and op in ("open_sampler", "save_sampler_weights"):
            path = (header.get("source") or {}).get("path")
            self.samplers.setdefault(sampler, SamplerState(sampler, worker_index, path, model_id, label or sampler))
        if op == "rejected":
            if header.get("asked") == "create_model" and model_id:
                self.refused_models[model_id] = header["error"]
            self.futures.finish(header["request_id"], failure(header["error"], header["category"]))

    def replay(
        self, headers: Iterable[Mapping[str, Any]], worker_index: int, taken_back: frozenset[int] = frozenset()
    ) -> None:
        """Apply a whole log but for the requests (by `seq`) that were taken back."""
        for header in headers:
            if header.get("seq") not in taken_back:
                self.apply(header, worker_index)
            elif header["op"] != "close":
                self._note_taken_back(header["request_id"])

    def take_back(self, futures: Iterable[Future]) -> None:
        """Forget these: what they made does not exist, and their ids are used again under another name."""
        lost = list(futures)
        for future in lost:
            self._note_taken_back(future.request_id)
            self.futures.drop(future)
            sampler = future.facts.get("sampling_session_id")
            if sampler is not None:
                self.samplers.pop(sampler, None)
            if future.op == "create_model":
                self.models.pop(future.model_id or "", None)
            self.refused_models.pop(future.model_id or "", None)
        kept: dict[str, list[Future]] = {future.model_id: [] for future in lost if future.model_id in self.models}
        for future in self.futures:
            if future.model_id in kept and future.seq_id:
                kept[future.model_id].append(future)
        for model_id, left in kept.items():
            model = self.models[model_id]
            model.next_seq, model.early, model.age = 1, set(), Age(model.born)
            for future in sorted(left, key=lambda future: future.seq_id or 0):
                model.arrived(future.seq_id or 0, model.last_request_at)
                model.age.note({"op": future.op, **future.facts})

    def _note_taken_back(self, request_id: str) -> None:
        self._taken_back.setdefault(request_id.partition("~")[0], set()).add(request_id)

    def gap_before(self, future: Future) -> int | None:
        """The seq_id a pending request waits for because the client never sent it; None if there is none."""
        model = self.models.get(future.model_id or "")
        if model is None or future.seq_id is None or future.seq_id < model.next_seq:
            return None
        return model.next_seq
