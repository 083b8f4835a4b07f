"""Which layout to use and whether the job fits, from config.json and the sizes of the GPUs (pure).

Every layout that the model's heads, experts, layers and vocabulary allow is costed (memory_model.py), once with the
activations kept for the backward and once with those of each layer computed again: a third more time, for micro-batches
many times as large. Of those with room for a micro-batch worth computing (and, where activations are computed again,
for sequences worth sampling), the cheapest is taken: the fewest pipeline stages, then activations that are kept, then
the smallest tensor parallel size, then the smallest expert parallel size; all other ranks are copies that share the
batch. A single sequence longer than a micro-batch is computed again whatever the layout
(megatron_adapters/training_pass.py), so the longest that can be trained is that of recomputation.

World size = tp_size * pp_size * dp_size. Expert parallel ranks are taken out of the tp_size * dp_size ranks of a
pipeline stage, so ep_size divides that product (Megatron's "parallel folding", expert tensor parallel size 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.memory_model import (
    CACHE_SHARE_CPU,
    CACHE_SHARE_GPU,
    GIB,
    MARGIN,
    Job,
    Memory,
    cache_bytes_per_token,
    fixed_memory,
    memory,
    snapshot_memory,
    tokens_that_fit,
    workspace_bytes,
)
from launch.model_sizes import ModelSizes, Split

GOOD_TOKENS = 4096
"""Of a micro-batch: matrix products of this many rows keep a GPU busy; more is hardly faster."""
ENOUGH_TOKENS = 2048
"""With room for the activations of this many, they are kept; with less, computed again in the backward."""
GOOD_CONTEXT = 32_768
"""Of a sequence, or a quarter of the model's context if that is less: a layout that computes activations again is among
the good ones only if a sequence so long can be trained, and sampled from its cache. Otherwise ranks are better spent on
cutting the model: longer sequences are not refused, and decoding, which reads the weights once for all samples under
way, has more of them. It is what the model cards of Qwen3 generate (max_new_tokens)."""
LEAST_TOKENS = 512
"""A job that cannot train this many tokens at once is said not to fit."""
MAX_TOKENS = 8192
"""Micro-batches are not made larger than this, whatever the room (and no larger than GOOD_TOKENS if it is unknown)."""
RANKS_OF_A_NODE, MOST_NODES = 8, 64
"""What is tried, to say what a model that does not fit would fit on."""
MAX_ROWS = 256
"""Samples at a time (megatron_adapters/sampler.py): more cache than they can fill is not planned."""


@dataclass(frozen=True)
class Machine:
    """The ranks a job has. `memory_gib`: of one rank, that is of its GPU."""

    nodes: int
    ranks_per_node: int
    memory_gib: float
    on_gpu: bool = True
    sliced: bool = False
    """The GPU is a slice of one (MIG): a rank there is alone, without NVLink or CUDA IPC to others."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Wish:
    """Sizes given by hand; None is chosen."""

    tp_size: int | None = None
    ep_size: int | None = None
    pp_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """A layout, and what one rank holds under it."""

    tp_size: int
    ep_size: int
    pp_size: int
    dp_size: int
    dtype: str
    token_budget: int
    """Tokens of a micro-batch."""
    longest_sequence: int
    """Tokens of the longest sequence that can be trained: it would be a micro-batch of its own."""
    recompute: bool
    """Activations are computed again in the backward instead of being kept; of sequences longer than token_budget they
    are in any case."""
    cache_tokens: int
    """Tokens of all samples under way together, in each of the dp_size copies."""
    memory: Memory
    """Where it does not fit, what a micro-batch of LEAST_TOKENS would need, without a cache."""
    capacity: float
    """Bytes of one rank; infinite where it is not known."""
    fits: bool
    reasons: tuple[str, ...]

    @property
    def capacity_known(self) -> bool:
        return math.isfinite(self.capacity)

    def to_json(self) -> dict[str, Any]:
        """Plain values, memory in bytes and with its total; null what depends on a capacity that is not known."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        shown = {**asdict(self), "memory": memory}
        if not self.capacity_known:
            memory |= dict.fromkeys(("snapshots", "cache", "total"))
            shown |= dict.fromkeys(("capacity", "fits", "longest_sequence", "cache_tokens"))
        return shown


def make_plan(
    sizes: ModelSizes,
    machine: Machine,
    *,
    wish: Wish | None = None,
    lora_rank: int = 32,
    num_adapters: int = 1,
    per_expert: bool = False,
) -> Plan | None:
    """The best layout for this model on this machine; None if no layout divides both model and machine."""
    wish = wish or Wish()
    job = Job(2 if machine.on_gpu else 4, machine.on_gpu, lora_rank, num_adapters, per_expert)
    costed = _all_costed(sizes, machine, wish, job)
    if not costed:
        return None
    chosen = min(costed, key=_preference)
    longest = _longest(costed, chosen.split)
    reasons = _reasons(sizes, machine, wish, job, chosen=chosen, longest=longest, costed=costed)
    return Plan(
        tp_size=chosen.split.tp_size,
        ep_size=chosen.split.ep_size,
        pp_size=chosen.split.pp_size,
        dp_size=machine.world_size // (chosen.split.tp_size * chosen.split.pp_size),
        dtype="bfloat16" if machine.on_gpu else "float32",
        token_budget=chosen.token_budget,
        longest_sequence=longest,
        recompute=chosen.recompute,
        cache_tokens=chosen.cache_tokens,
        memory=chosen.memory,
        capacity=machine.memory_gib * GIB,
        fits=chosen.fits,
        reasons=tuple(reasons),
    )


def possible_layouts(sizes: ModelSizes, machine: Machine, wish: Wish) -> Iterator[Split]:
    """Every cut that fits the model and the machine, tensor parallel groups within a node."""
    for tp_size in _divisors(machine.ranks_per_node):
        if wish.tp_size not in (None, tp_size) or not tp_fits(sizes, tp_size):
            continue
        for pp_size in _divisors(machine.world_size // tp_size):
            if wish.pp_size not in (None, pp_size) or pp_size > sizes.num_layers:
                continue
            stage_ranks = machine.world_size // pp_size
            for ep_size in _divisors(stage_ranks) if sizes.num_experts else (1,):
                if wish.ep_size in (None, ep_size) and (ep_size == 1 or sizes.num_experts % ep_size == 0):
                    yield Split(tp_size, ep_size, pp_size)


def tp_fits(sizes: ModelSizes, tp_size: int) -> bool:
    """Whether the heads and every matrix can be cut into so many parts (families.check_layout's rule).

    More ranks than key-value heads hold copies of them; a vocabulary is padded.
    """
    widths = (sizes.num_heads, sizes.ffn_size if sizes.num_dense_layers else 0, sizes.shared_ffn_size)
    kv_heads = sizes.num_kv_heads % tp_size == 0 or tp_size % sizes.num_kv_heads == 0
    vocab = (tp_size - 1) * Split(tp_size).vocab_rows(sizes) < sizes.vocab_size
    return all(width % tp_size == 0 for width in widths) and kv_heads and vocab


@dataclass(frozen=True)
class _Costed:
    split: Split
    recompute: bool
    room: float
    """Bytes left beside all that stays, and the workspace; negative if they do not fit, infinite if memory is."""
    token_budget: int
    tokens: int
    """That fit at once, up to the model's context."""
    cache_tokens: int
    memory: Memory
    max_context: int

    @property
    def fits(self) -> bool:
        return self.has_room_for(LEAST_TOKENS)

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence that has room both in a micro-batch and in the cache."""
        return min(self.tokens, self.cache_tokens)

    def has_room_for(self, tokens: int) -> bool:
        return self.tokens >= min(tokens, self.max_context)

    def reaches_far(self) -> bool:
        return self.reach >= min(GOOD_CONTEXT, self.max_context // 4)


def _cost(sizes: ModelSizes, machine: Machine, split: Split, job: Job) -> _Costed:
    alone = machine.world_size == 1
    usable = machine.memory_gib * GIB * (1 - MARGIN)
    left = usable - sum(fixed_memory(sizes, split, job))
    snapshots = snapshot_memory(sizes, split, job, left)
    tokens = tokens_that_fit(sizes, split, job, left - snapshots, alone=alone)
    budget = int(max(1, min(tokens, MAX_TOKENS if math.isfinite(tokens) else GOOD_TOKENS)))
    least = min(LEAST_TOKENS, sizes.max_context)
    fits = tokens >= least
    room = left - snapshots - workspace_bytes(sizes, split, job, budget, alone=alone)
    share = CACHE_SHARE_GPU if machine.on_gpu else CACHE_SHARE_CPU
    per_cached = max(1, cache_bytes_per_token(sizes, split, job))
    cache_tokens = int(max(0.0, min(share * room / per_cached, MAX_ROWS * sizes.max_context)))
    return _Costed(
        split=split,
        recompute=job.recompute,
        room=room,
        token_budget=budget,
        tokens=int(min(tokens, sizes.max_context)),
        cache_tokens=cache_tokens,
        memory=memory(
            sizes,
            split,
            job,
            budget if fits else least,
            cache_tokens=cache_tokens if fits else 0,
            snapshots=snapshots,
            alone=alone,
        ),
        max_context=sizes.max_context,
    )


def _all_costed(sizes: ModelSizes, machine: Machine, wish: Wish, job: Job) -> list[_Costed]:
    """Every possible layout, with the activations kept and with them computed again."""
    layouts = list(possible_layouts(sizes, machine, wish))
    return [_cost(sizes, machine, split, one) for one in (job, replace(job, recompute=True)) for split in layouts]


def _longest(costed: list[_Costed], split: Split) -> int:
    """Tokens of the longest sequence that can be trained under a layout: that of recomputation."""
    return next(c.tokens for c in costed if c.recompute and c.split == split)


def _preference(costed: _Costed) -> tuple[float, ...]:
    """Smaller is better. Those with much room by their stages, then whether activations are kept, then by what they
    communicate; then those that compute again by how far they reach, and those that do not fit by what they would need.
    """
    split, again = costed.split, costed.recompute
    if costed.has_room_for(GOOD_TOKENS) and (costed.reaches_far() or not again):
        return (0, split.pp_size, again, 0, 0, split.tp_size, split.ep_size)
    if costed.has_room_for(ENOUGH_TOKENS) and not again:
        return (0, split.pp_size, again, 1, -costed.tokens, split.tp_size, split.ep_size)
    if costed.fits and again:
        return (1, -costed.reach, split.pp_size, split.tp_size, split.ep_size)
    return (2, costed.memory.total, not again, split.pp_size, split.tp_size, split.ep_size)


def _reasons(
    sizes: ModelSizes, machine: Machine, wish: Wish, job: Job, *, chosen: _Costed, longest: int, costed: list[_Costed]
) -> list[str]:
    """The plan in words, the most important first."""
    split, capacity = chosen.split, machine.memory_gib
    whole = sizes.num_parameters * job.bytes_per_number
    dtype = "bfloat16" if machine.on_gpu else "float32"
    count = f"{machine.world_size} rank" + ("s" if machine.world_size > 1 else "")
    room = f"of {capacity:g} GiB" if math.isfinite(capacity) else "whose memory is not known"
    words = [
        f"The weights are {_size_text(whole)} in {dtype} ({_count_text(sizes.num_parameters)} parameters), "
        f"for {count} {room}, {machine.ranks_per_node} on a node."
    ]
    if split.tp_size > 1:
        words.append(_why_tp(wish, chosen, costed))
    if sizes.num_experts:
        words.append(_why_ep(sizes, wish, chosen, costed))
    if split.pp_size > 1:
        words.append(_why_pp(wish, chosen, costed))
    if chosen.recompute and chosen.fits:
        words.append(_why_recompute(chosen, costed))
    if not math.isfinite(capacity):
        words.append(
            "Whether that fits is not known, nor for how many samples and how long sequences there is room: the worker "
            "measures what is free when it starts, and cuts micro-batches that do not fit. Give --memory (for example "
            "64G, of each node) to have it planned."
        )
    elif not chosen.fits:
        words.append(
            f"It does not fit: with a micro-batch of {min(LEAST_TOKENS, sizes.max_context)} tokens a rank would hold "
            f"{_size_text(chosen.memory.total)}, and it may fill {_size_text(capacity * GIB * (1 - MARGIN))} "
            f"({MARGIN:.0%} of its memory stay free)."
        )
        words.append(_what_would_fit(sizes, machine, wish, job))
    else:
        words.append(_why_long(sizes, chosen, longest, costed))
        if fewer := _fewer_do_better(sizes, machine, wish, job, chosen=chosen, longest=longest):
            words.append(fewer)
    return words


def _why_tp(wish: Wish, chosen: _Costed, costed: list[_Costed]) -> str:
    size = chosen.split.tp_size
    if wish.tp_size:
        return f"Tensor parallel size {size}, as given."
    alike = [c for c in costed if c.split.pp_size == chosen.split.pp_size and c.recompute == chosen.recompute]
    smaller = [c for c in alike if c.split.tp_size < size]
    if not smaller:
        return f"Tensor parallel size {size}."
    best = max(smaller, key=lambda c: (c.tokens, c.room))
    return (
        f"Tensor parallel size {size}: {best.split.tp_size} would leave {_left(best)}; {size} leaves {chosen.tokens}."
    )


def _why_ep(sizes: ModelSizes, wish: Wish, chosen: _Costed, costed: list[_Costed]) -> str:
    size = chosen.split.ep_size
    if size == 1:
        return f"Expert parallel size 1: every rank holds all {sizes.num_experts} experts of a layer."
    words = (
        f"Expert parallel size {size}: every rank holds {sizes.num_experts // size} of the {sizes.num_experts} experts "
        "of a layer"
    )
    if wish.ep_size:
        return f"{words}, as given."
    alike = [c for c in costed if replace(c.split, ep_size=size) == chosen.split and c.recompute == chosen.recompute]
    smaller = [c for c in alike if c.split.ep_size < size]
    if not smaller:
        return f"{words}."
    best = max(smaller, key=lambda c: (c.tokens, c.room))
    return f"{words}; {best.split.ep_size} would leave {_left(best)}."


def _why_pp(wish: Wish, chosen: _Costed, costed: list[_Costed]) -> str:
    size = chosen.split.pp_size
    if wish.pp_size:
        return f"{size} pipeline stages, as given."
    best = max((c for c in costed if c.split.pp_size < size), key=lambda c: (c.reach, c.room))
    room = _left(best) + (f" and {best.cache_tokens} in the KV cache" if best.room > 0 else "")
    return f"{size} pipeline stages: {best.split.pp_size} would leave {room}."


def _left(costed: _Costed) -> str:
    return f"room for {costed.tokens} tokens at a time" if costed.room > 0 else "no room beside the weights"


def _why_recompute(chosen: _Costed, costed: list[_Costed]) -> str:
    stages = chosen.split.pp_size
    longest = max(c.tokens for c in costed if not c.recompute and c.split.pp_size == stages)
    return (
        "Activations are computed again in the backward, which takes a third more time: kept, they would leave "
        f"{f'room for {longest} tokens at a time' if longest else 'no room for a micro-batch'}."
    )


def _why_long(sizes: ModelSizes, chosen: _Costed, longest: int, costed: list[_Costed]) -> str:
    words = f"Sequences of up to {longest} tokens can be trained"
    if not chosen.recompute and longest > chosen.token_budget:
        words += f" (activations of those beyond {chosen.token_budget} are computed again in the backward)"
    if longest < sizes.max_context:
        words += f"; the model's context of {sizes.max_context} needs more memory than this layout leaves"
        best = min(costed, key=lambda c: (-c.tokens, _preference(c)))
        if best.tokens > longest:
            sizes_given = {name: size for name, size in asdict(best.split).items() if size > 1}
            options = " ".join(f"--{name.replace('_', '-')} {size}" for name, size in sizes_given.items())
            words += f". More ranks for a copy of the model ({options}) would leave room for {best.tokens}"
    return words + "."


def _fewer_do_better(
    sizes: ModelSizes, machine: Machine, wish: Wish, job: Job, *, chosen: _Costed, longest: int
) -> str | None:
    """What a number of GPUs that divides the model would do, where this one cuts it into stages: no shorter sequences
    in fewer stages, without computing again what is kept here. Looked for among more than half of a node's GPUs: with
    fewer, the time lost to stages may be less than that of the GPUs left out.
    """
    if not machine.on_gpu or chosen.split.pp_size == 1:
        return None
    better = []
    for num in range(machine.ranks_per_node // 2 + 1, machine.ranks_per_node):
        costed = _all_costed(sizes, replace(machine, ranks_per_node=num), wish, job)
        best = min(costed, key=_preference, default=None)
        if best is None or not best.fits or best.split.pp_size >= chosen.split.pp_size:
            continue
        reach = _longest(costed, best.split)
        if reach >= longest and best.recompute <= chosen.recompute:
            better.append((best.split.pp_size, best.recompute, -reach, num))
    if not better:
        return None
    stages, recompute, reach, num = min(better)
    kept = ", keep the activations" if chosen.recompute and not recompute else ""
    return (
        f"{num} of these GPUs on a node would do better, as they divide the model into fewer stages ({stages} instead "
        f"of {chosen.split.pp_size}){kept} and leave room for sequences of up to {-reach} tokens: take "
        f"--gpus-per-node {num}."
    )


def _what_would_fit(sizes: ModelSizes, machine: Machine, wish: Wish, job: Job) -> str:
    """The smallest number of such GPUs on a node, of such nodes, and of both together, with which it would fit.

    Also a smaller one than was asked for: it may divide the model where that does not. On CPUs the ranks of a node
    share its memory, so what is said is how much of it would do.
    """
    if machine.sliced:
        return "Slices of GPUs (MIG) cannot share a model: take a larger slice, whole GPUs, or a smaller model."

    def first(machines: Iterable[Machine]) -> Machine | None:
        return next((m for m in machines if _fits(sizes, m, wish, job)), None)

    most = max(RANKS_OF_A_NODE, machine.ranks_per_node)
    ways = []
    if not machine.on_gpu:
        ways.append(_enough_memory(sizes, machine, wish, job))
    elif other := first(replace(machine, ranks_per_node=n) for n in range(1, most + 1)):
        fewer = other.ranks_per_node < machine.ranks_per_node
        better = f", which divide the model better than {machine.ranks_per_node}" if fewer else ""
        ways.append(f"with {other.ranks_per_node} such GPUs on a node{better}")
    else:
        lengths, widths = range(machine.nodes + 1, MOST_NODES + 1), range(machine.ranks_per_node + 1, most + 1)
        larger = (replace(machine, nodes=nodes, ranks_per_node=n) for nodes in lengths for n in widths)
        if both := first(sorted(larger, key=lambda m: (m.world_size, m.nodes))):
            ways.append(f"on {both.nodes} nodes with {both.ranks_per_node} such GPUs each")
    if longer := first(replace(machine, nodes=n) for n in range(1, MOST_NODES + 1)):
        ways.append(f"on {longer.nodes} such node" + ("s" if longer.nodes > 1 else ""))
    if ways:
        return f"It would fit {', or '.join(ways)}."
    return (
        f"It would not fit on {MOST_NODES} nodes with {most} such GPUs each either: take GPUs with more memory, or a "
        "smaller model."
    )


def _enough_memory(sizes: ModelSizes, machine: Machine, wish: Wish, job: Job) -> str:
    """The fewest whole GiB of a node with which it would fit."""
    ranks = machine.ranks_per_node
    least = math.ceil(min(c.memory.total for c in _all_costed(sizes, machine, wish, job)) * ranks / GIB)
    enough = next(n for n in itertools.count(least) if _fits(sizes, replace(machine, memory_gib=n / ranks), wish, job))
    return f"with {enough} GiB of memory on a node (--memory {enough}G)"


def _fits(sizes: ModelSizes, machine: Machine, wish: Wish, job: Job) -> bool:
    if sizes.num_parameters * job.bytes_per_number > machine.world_size * machine.memory_gib * GIB * (1 - MARGIN):
        return False  # soon said, and needs no layout
    jobs = (replace(job, recompute=True), job)
    return any(
        _cost(sizes, machine, split, one).fits for split in possible_layouts(sizes, machine, wish) for one in jobs
    )


def _size_text(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def _count_text(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
