"""Everything the gateway knows of what it accepted, built from request headers alone.

`apply` takes a header the moment it is accepted, and every header of the log after a restart: one way in, so that a
restarted gateway knows exactly what the first one knew. Lives on the event loop: no locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinker_hpc.gateway.answers import facts_of, failure, reply_of
from tinker_hpc.gateway.completions import target_of
from tinker_hpc.gateway.futures import Future, FutureTable


@dataclass(slots=True)
class ModelState:
    """One model (an adapter in training).

    Attributes:
        lora: {rank, seed, train_mlp, train_attn, train_unembed}.
        next_seq: the lowest seq_id that has not arrived; the worker can run nothing from there on.
        early: seq_ids that arrived beyond it.
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

    def arrived(self, seq_id: int, at: float) -> None:
        """Note a request in the model's order."""
        self.last_request_at = max(self.last_request_at, at)
        if seq_id >= self.next_seq:
            self.early.add(seq_id)
        while self.next_seq in self.early:
            self.early.remove(self.next_seq)
            self.next_seq += 1


@dataclass(frozen=True, slots=True)
class SamplerState:
    """One sampler: the base model (`model_path` and `model_id` None), a checkpoint or an in-memory snapshot."""

    sampling_session_id: str
    worker_index: int
    model_path: str | None
    model_id: str | None


class Ledger:
    """Futures, models and samplers."""

    def __init__(self) -> None:
        self.futures = FutureTable()
        self.models: dict[str, ModelState] = {}
        self.samplers: dict[str, SamplerState] = {}
        self.refused_models: dict[str, str] = {}
        self.closed = False

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
            reply=reply_of(header),
            facts=facts_of(header),
            target=target_of(header["sampling_session_id"], header["seq_id"]) if is_sample else None,
        )
        self.futures.add(future)
        return future

    def apply(self, header: Mapping[str, Any], worker_index: int) -> None:
        """The record is durable: what it says is so."""
        op, model_id = header["op"], header.get("model_id")
        if op == "close":
            self.closed = True
            return
        if header["request_id"] not in self.futures:
            self.enter(header, worker_index)
        seq_id = header.get("seq_id")
        if op == "create_model":
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
                ),
            )
        elif model_id in self.models and seq_id is not None:
            self.models[model_id].arrived(seq_id, header["accepted_at"])
        if header.get("sampling_session_id") and op in ("open_sampler", "save_sampler_weights"):
            source = header.get("source") or {}
            self.samplers.setdefault(
                header["sampling_session_id"],
                SamplerState(header["sampling_session_id"], worker_index, source.get("path"), model_id),
            )
        if op == "rejected":
            if header.get("asked") == "create_model" and model_id:
                self.refused_models[model_id] = header["error"]
            self.futures.finish(header["request_id"], failure(header["error"], header["category"]))

    def replay(self, headers: Iterable[Mapping[str, Any]], worker_index: int) -> None:
        """Apply a whole log."""
        for header in headers:
            self.apply(header, worker_index)

    def gap_before(self, future: Future) -> int | None:
        """The seq_id a pending request waits for because the client never sent it; None if there is none."""
        model = self.models.get(future.model_id or "")
        if model is None or future.seq_id is None or future.seq_id < model.next_seq:
            return None
        return model.next_seq
