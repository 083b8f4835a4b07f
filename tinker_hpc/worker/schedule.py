"""Step 5 of a request. Before: worker/loop.py, from the request log. After: worker/train_step.py, sample_step.py.

Which requests run next. Pure: no files, no clock, no tensors.

- Requests of one model run in `seq_id` order, from 1, without gaps: one that came early is held until the gap closes.
- A `rejected` request only closes its gap.
- Order is total, so whatever changes or stores weights is a barrier of its model; other models pass freely.
- Neighbouring forward_backward passes, of one model or of several, are grouped, the models taking turns within a group
  (passes of different models are then computed together: batch.train_groups); so are all samples.
- Whoever was served longest ago is served next: each model, the samplers' opening, and sampling as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tinker_hpc.log import Record

MAX_GROUP_REQUESTS = 16
MAX_GROUP_TOKENS = 65_536
"""A group of passes ends here, so that others get their turn; one pass may be longer by itself."""
PASS = "forward_backward"
MODEL_OPS = frozenset({PASS, "optim_step", "save_state", "load_state", "save_sampler_weights"})
CANCELLED = "this sample was cancelled by its client"
_SAMPLING = "sampling"  # turn-taking key beside the models' ids, which hold a colon
_OPENING = "opening"


Category = Literal["user", "server"]


@dataclass(frozen=True)
class Batch:
    """Requests that run together, in this order."""

    kind: Literal["train", "sample"]
    requests: tuple[Record, ...]
    groups: tuple[list[Record], ...] | None = None
    """How it was cut into what is computed at once when it ran first, those among them that are not run again too; None
    if it has not run before."""

    @property
    def seqs(self) -> list[int]:
        return [r.header["seq"] for r in self.requests]


@dataclass(frozen=True)
class Refusal:
    """A request that will never run, and why."""

    request: Record
    error: str
    category: Category = "user"


@dataclass
class _Line:
    """One model's requests."""

    ready: deque[Record] = field(default_factory=deque)
    held: dict[int, Record] = field(default_factory=dict)
    next_seq_id: int = 1
    failed: str | None = None
    """Why nothing of this model can run."""


@dataclass
class _Sampler:
    """A sampler's requests until it is open."""

    open: bool = False
    failed: str | None = None
    waiting: list[Record] = field(default_factory=list)


class Schedule:
    """The requests read so far and not yet done."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._samplers: dict[str, _Sampler] = {}
        self._opening: deque[Record] = deque()
        self._samples: dict[int, Record] = {}  # ready, by seq, in log order
        self._seen: set[str] = set()
        self._cancelled: set[str] = set()
        self._turn = 0
        self._served: dict[str, int] = {}
        self.closing = False
        """A `close` was read: nothing follows."""

    def add(self, request: Record) -> list[Refusal]:
        """Take in the next record of the log. Returns it with a reason if it can never run."""
        header = request.header
        op, request_id = header["op"], header.get("request_id")
        if op == "close":
            self.closing = True
            return []
        if self.knows(request):
            return []
        if request_id is not None:
            self._seen.add(request_id)
        if op == "create_model":
            return self._add_model(request)
        if op in MODEL_OPS or op == "rejected":
            return self._add_to_model(request)
        if op == "open_sampler":
            self._samplers.setdefault(header["sampling_session_id"], _Sampler())
            self._opening.append(request)
            return []
        if op == "sample":
            return self._add_sample(request)
        if op == "cancel":
            self._cancelled.add(header["cancels"])
            return []
        return [Refusal(request, f"the worker does not know the operation {op!r}; are gateway and worker one version?")]

    def knows(self, request: Record) -> bool:
        """Whether it was appended again after an unclear answer of the disk: the first one runs."""
        return request.header.get("request_id") in self._seen

    def ignore(self, request_id: str) -> None:
        """A request of this id never runs: it was taken back."""
        self._seen.add(request_id)

    def next_batch(self, *, sampling: bool = True) -> Batch | None:
        """What to run now, taken out of the schedule; None if nothing can. `sampling=False`: anything but samples."""
        heads = {key: line.ready[0] for key, line in self._lines.items() if line.ready}
        if self._opening:
            heads[_OPENING] = self._opening[0]
        if sampling and self._samples:
            heads[_SAMPLING] = next(iter(self._samples.values()))
        if not heads:
            return None
        order = sorted(heads, key=lambda key: (self._served.get(key, 0), heads[key].header["seq"]))
        first = order[0]
        if first == _SAMPLING:
            return Batch("sample", tuple(self.take_samples()))
        if heads[first].header["op"] != PASS:
            self._serve(first)
            queue = self._opening if first == _OPENING else self._lines[first].ready
            return Batch("train", (queue.popleft(),))
        return Batch("train", tuple(self._take_passes([key for key in order if key in self._lines])))

    def take_samples(self) -> list[Record]:
        """All samples that can run now, taken out of the schedule."""
        taken = list(self._samples.values())
        self._samples.clear()
        if taken:
            self._serve(_SAMPLING)
        return taken

    def take_cancelled(self) -> tuple[list[Refusal], set[str]]:
        """Samples cancelled before they ran, taken out of the schedule; and the other cancelled request ids."""
        if not self._cancelled:
            return [], set()
        cancelled, self._cancelled = self._cancelled, set()
        lost = [request for request in self._samples.values() if request.header["request_id"] in cancelled]
        for request in lost:
            del self._samples[request.header["seq"]]
        for sampler in self._samplers.values():
            lost += [request for request in sampler.waiting if request.header["request_id"] in cancelled]
            sampler.waiting = [request for request in sampler.waiting if request.header["request_id"] not in cancelled]
        return [Refusal(request, CANCELLED) for request in lost], cancelled - {r.header["request_id"] for r in lost}

    def take(self, seqs: Sequence[int]) -> list[Record] | None:
        """Exactly these, in this order (a recorded batch, on redo). None, and nothing taken, if one is not ready."""
        queues = [line.ready for line in self._lines.values()] + [self._opening]
        wanted, found = set(seqs), {seq: self._samples[seq] for seq in seqs if seq in self._samples}
        for queue in queues:
            for request in queue:
                if request.header["seq"] not in wanted:
                    break
                found[request.header["seq"]] = request
        if wanted - set(found):
            return None
        for queue in queues:
            while queue and queue[0].header["seq"] in wanted:
                queue.popleft()
        for seq in seqs:
            self._samples.pop(seq, None)
        return [found[seq] for seq in seqs]

    def training_waits(self) -> bool:
        """Whether anything but sampling could run now."""
        return bool(self._opening) or any(line.ready for line in self._lines.values())

    def finish(self, request: Record, *, error: str | None) -> list[Refusal]:
        """Say how a request ended. Returns requests that can never run because it failed."""
        header = request.header
        if header["op"] == "create_model" and error is not None:
            return self._fail_model(header["model_id"], f"model {header['model_id']} could not be created: {error}")
        sampler_id = header.get("sampling_session_id")
        if header["op"] not in ("open_sampler", "save_sampler_weights") or sampler_id is None:
            return []
        if error is not None:
            return self._fail_sampler(sampler_id, f"the sampler could not be opened: {error}")
        sampler = self._samplers[sampler_id]
        sampler.open, sampler.failed = True, None
        self._samples |= {r.header["seq"]: r for r in sampler.waiting}
        sampler.waiting = []
        return []

    def abandon(self) -> list[Refusal]:
        """Give up what waits for something that will not come any more (after `close`)."""
        lost = []
        for line in self._lines.values():
            for request in line.held.values():
                reason = (
                    f"the run was closed before request {line.next_seq_id} of this model, which comes first, arrived"
                )
                lost.append(Refusal(request, reason, "server"))
            line.held.clear()
        for sampler in self._samplers.values():
            lost += [Refusal(r, "the run was closed before the sampler was open", "server") for r in sampler.waiting]
            sampler.waiting = []
        return [refusal for refusal in lost if refusal.request.header["op"] != "rejected"]

    def _fail_model(self, model_id: str, error: str) -> list[Refusal]:
        """Nothing of this model can run, now or later. Returns its requests that were waiting, and the samples that
        waited for a sampler which one of them would have made.
        """
        line = self._lines[model_id]
        line.failed = error
        lost = [*line.ready, *line.held.values()]
        line.ready.clear()
        line.held.clear()
        refusals = [Refusal(request, error) for request in lost if request.header["op"] != "rejected"]
        for request in lost:
            if request.header["op"] == "save_sampler_weights" and request.header.get("sampling_session_id"):
                refusals += self._fail_sampler(request.header["sampling_session_id"], error)
        return refusals

    def _fail_sampler(self, sampler_id: str, error: str) -> list[Refusal]:
        """No sample of this sampler can run, now or later. Returns those that were waiting."""
        sampler = self._samplers[sampler_id]
        sampler.open, sampler.failed = False, error
        lost, sampler.waiting = sampler.waiting, []
        return [Refusal(request, error) for request in lost]

    def _add_model(self, request: Record) -> list[Refusal]:
        model_id = request.header["model_id"]
        if model_id in self._lines:
            return [Refusal(request, f"model {model_id} exists already; create it under a new id")]
        self._lines[model_id] = _Line(ready=deque([request]))
        return []

    def _add_to_model(self, request: Record) -> list[Refusal]:
        header = request.header
        rejected = header["op"] == "rejected"
        line = self._lines.get(str(header.get("model_id")))
        if line is None or header.get("seq_id") is None:
            reason = (
                f"model {header.get('model_id')!r} was never created on this worker; create a training client first"
            )
            return [] if rejected else [Refusal(request, reason)]
        if line.failed is not None:
            return [] if rejected else [Refusal(request, line.failed)]
        seq_id = header["seq_id"]
        if seq_id < line.next_seq_id or seq_id in line.held:
            reason = (
                f"seq_id {seq_id} of model {header['model_id']} was used by an earlier request; use the next free one"
            )
            return [] if rejected else [Refusal(request, reason)]
        if header["op"] == "save_sampler_weights" and header.get("sampling_session_id"):
            self._samplers.setdefault(header["sampling_session_id"], _Sampler())
        line.held[seq_id] = request
        while line.next_seq_id in line.held:
            released = line.held.pop(line.next_seq_id)
            line.next_seq_id += 1
            if released.header["op"] != "rejected":
                line.ready.append(released)
        return []

    def _add_sample(self, request: Record) -> list[Refusal]:
        sampler = self._samplers.get(request.header["sampling_session_id"])
        if sampler is None:
            name = request.header["sampling_session_id"]
            return [Refusal(request, f"sampler {name!r} is not known to this worker; create a sampling client first")]
        if sampler.open:
            self._samples[request.header["seq"]] = request
        elif sampler.failed is not None:
            return [Refusal(request, sampler.failed)]
        else:
            sampler.waiting.append(request)
        return []

    def _take_passes(self, keys: Iterable[str]) -> list[Record]:
        """Passes at the heads of these lines, one of each in turn, within the limits and at least one."""
        taken: list[Record] = []
        num_tokens = 0
        waiting = deque(keys)
        while waiting:
            key = waiting.popleft()
            ready = self._lines[key].ready
            if not ready or ready[0].header["op"] != PASS:
                continue
            size = _num_tokens(ready[0])
            if taken and (len(taken) == MAX_GROUP_REQUESTS or num_tokens + size > MAX_GROUP_TOKENS):
                return taken
            taken.append(ready.popleft())
            num_tokens += size
            self._serve(key)
            waiting.append(key)
        return taken

    def _serve(self, key: str) -> None:
        self._turn += 1
        self._served[key] = self._turn


def _num_tokens(request: Record) -> int:
    """0 for one whose payload was compacted: it was answered long ago."""
    return request.arrays["tokens"].size if "tokens" in request.arrays else 0
