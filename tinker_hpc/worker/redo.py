"""What a restarted worker does with the log before anything new. Pure.

A worker that starts finds the results of its predecessors (other fencing numbers). Its models are gone with them, so it
runs the log again from its start state, in the recorded batches, and says nothing about what was answered already. What
has no effect on later requests (samples, forward passes, saved folders) is not run again.

The start state is the beginning of the log today; a snapshot of all models would only move it (`Redo.batches` from
there on). The same requests in the same order on the same layout give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tinker_hpc.log import Record

_ALWAYS = frozenset({"create_model", "optim_step", "load_state", "open_sampler"})


@dataclass
class Redo:
    """The recorded past: which batches ran, which requests were answered and how."""

    batches: deque[list[int]] = field(default_factory=deque)
    """`seqs` of each, in the order they ran; taken from the left as they are run again."""
    answered: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Result headers by `seq` of the request."""
    _batched: set[int] = field(default_factory=set)

    def learn(self, records: Iterable[Record]) -> None:
        """Take in records of older fences, in order."""
        for record in records:
            header = record.header
            if header["op"] == "batch":
                # An interrupted batch is announced again by the worker that completes it: the first time counts.
                seqs = [seq for seq in header["seqs"] if seq not in self._batched]
                self._batched |= set(seqs)
                if seqs:
                    self.batches.append(seqs)
            elif "ok" in header:
                self.answered[header["seq"]] = header

    def error_of(self, request: Record) -> str | None:
        """The recorded error of an answered request; None if it succeeded."""
        header = self.answered[request.header["seq"]]
        return None if header["ok"] else header["error"]

    def is_answered(self, request: Record) -> bool:
        return request.header["seq"] in self.answered

    def must_run(self, request: Record) -> bool:
        """Whether to compute this request (again)."""
        if not self.is_answered(request):
            return True
        if self.error_of(request) is not None:
            return False  # it failed then and left its model as it was
        header = request.header
        return (
            header["op"] in _ALWAYS
            or (header["op"] == "forward_backward" and not header["forward_only"])
            or (header["op"] == "save_sampler_weights" and header.get("sampling_session_id") is not None)
        )

    def difference(self, request: Record, fields: dict[str, Any]) -> str | None:
        """What came out otherwise than recorded, so that going on would be silently wrong; None if nothing."""
        recorded = self.answered[request.header["seq"]]
        if recorded.get("checkpoint") != fields.get("checkpoint"):
            return "the checkpoint it was loaded from has been overwritten since"
        return None
