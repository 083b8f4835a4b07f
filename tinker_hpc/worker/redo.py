"""What a restarted worker does with the log before anything new. Pure.

A worker that starts finds the results of its predecessors (other fencing numbers). Their models are gone with them but
for the newest snapshot, so it runs what that does not hold again, in the recorded batches, and says nothing about what
was answered already. What has no effect on later requests (samples, forward passes, saved folders) is not run again.

The whole log is walked either way: what the snapshot holds is only not computed, so that the schedule (which model
exists, which seq_id is next, which sampler failed to open) comes out of the same code as ever. The same requests in the
same order on the same layout give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinker_hpc.log import Record
from tinker_hpc.worker.snapshot_files import Coverage

_ALWAYS = frozenset({"create_model", "optim_step", "load_state", "open_sampler"})


@dataclass
class Redo:
    """The recorded past: which batches ran, which requests were answered and how."""

    batches: deque[list[int]] = field(default_factory=deque)
    """`seqs` of each, in the order they ran; taken from the left as they are run again."""
    answered: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Result headers by `seq` of the request."""
    lost: dict[int, str] = field(default_factory=dict)
    """Requests that a worker before this one could not repeat, by `seq`, and what is said of their model or sampler."""
    held: Coverage = field(default_factory=Coverage)
    """The requests whose effects the state holds that this worker started from."""
    taken_back: frozenset[int] = frozenset()
    """Requests that do not count any more (log/rewinds.py): nothing of them is redone or known."""
    _batched: set[int] = field(default_factory=set)

    def learn(self, records: Iterable[Record]) -> None:
        """Take in records of older fences, in order."""
        for record in records:
            header = record.header
            if header["op"] == "batch":
                # An interrupted batch is announced again by the worker that completes it: the first time counts.
                seqs = [seq for seq in header["seqs"] if seq not in self._batched and seq not in self.taken_back]
                self._batched |= set(seqs)
                if seqs:
                    self.batches.append(seqs)
            elif "ok" in header and header["seq"] not in self.taken_back:
                self.answered[header["seq"]] = header
            elif header["op"] == "lost" and header["seq"] not in self.taken_back:
                self.lost[header["seq"]] = header["error"]

    def error_of(self, request: Record) -> str | None:
        """The recorded error of an answered request; None if it succeeded."""
        header = self.answered[request.header["seq"]]
        return None if header["ok"] else header["error"]

    def is_answered(self, request: Record) -> bool:
        return request.header["seq"] in self.answered

    def ran_alone(self, request: Record) -> bool:
        """Whether a pass was computed by itself although its batch holds others."""
        return bool(self.answered.get(request.header["seq"], {}).get("alone"))

    def token_budget(self, request: Record) -> int | None:
        """Of the micro-batches in which a pass was computed; None: the worker's own."""
        return self.answered.get(request.header["seq"], {}).get("token_budget")

    def is_held(self, request: Record) -> bool:
        """Whether its effect is in the snapshot this worker started from."""
        return request.header["seq"] in self.held

    def must_run(self, request: Record) -> bool:
        """Whether to compute this request (again)."""
        if not self.is_answered(request):
            return True
        if self.is_held(request):
            return False
        if self.error_of(request) is not None:
            return False  # it failed then and left its model as it was
        header = request.header
        return (
            header["op"] in _ALWAYS
            or (header["op"] == "forward_backward" and not header["forward_only"])
            or (header["op"] == "save_sampler_weights" and header.get("sampling_session_id") is not None)
        )

    def together_with_new(self, groups: Iterable[Sequence[Record]]) -> set[int]:
        """Answered passes that are computed again all the same: those that ran together with one whose answer was lost,
        so that it comes out as it did beside them.
        """
        return {
            request.header["seq"]
            for group in groups
            if len(group) > 1 and any(not self.is_answered(request) for request in group)
            for request in group
            if self.is_answered(request) and self.error_of(request) is None and not self.is_held(request)
        }

    def difference(self, request: Record, fields: dict[str, Any]) -> str | None:
        """What came out otherwise than recorded, so that going on would be silently wrong; None if nothing."""
        recorded = self.answered[request.header["seq"]]
        if recorded.get("checkpoint") != fields.get("checkpoint"):
            return "the checkpoint it was loaded from has been overwritten since"
        return None
