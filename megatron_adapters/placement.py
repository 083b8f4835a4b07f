"""Which part of the model a rank holds: pure arithmetic, so that rank 0 knows what every other rank has.

Ranks are numbered as megatron-core's default order "tp-cp-ep-dp-pp" numbers them: TP fastest, stages slowest. Experts
see the tp_size * dp_size ranks of a stage as one line, cut into runs of ep_size; the runs are copies of each other.
"""

from __future__ import annotations

from typing import NamedTuple

from .interface import Layout


class Place(NamedTuple):
    """Coordinates of a rank, each from 0."""

    tp_rank: int = 0
    dp_rank: int = 0
    pp_rank: int = 0
    ep_rank: int = 0
    expert_copy: int = 0
    """which of the layout's `expert_copies` this rank belongs to"""


FIRST_RANK = Place()


def place_of(global_rank: int, layout: Layout) -> Place:
    """Coordinates of `global_rank`, 0 to layout.world_size - 1."""
    stage_size = layout.tp_size * layout.dp_size
    pp_rank, inside = divmod(global_rank, stage_size)
    dp_rank, tp_rank = divmod(inside, layout.tp_size)
    expert_copy, ep_rank = divmod(inside, layout.ep_size)
    return Place(tp_rank, dp_rank, pp_rank, ep_rank, expert_copy)


def stage_layers(num_layers: int, layout: Layout, pp_rank: int) -> range:
    """The decoder layers (from 0) of a stage: consecutive shares, equal where the stages divide them.

    What is left over goes to the stages in the middle first, one layer each, since the ends hold the embedding and the
    unembedding too; then to the last, then to the first, which keeps the activations of most micro-batches.
    """
    share, left = divmod(num_layers, layout.pp_size)
    last = layout.pp_size - 1
    longer = [*range(1, last), last, 0][:left]
    start = pp_rank * share + sum(stage < pp_rank for stage in longer)
    return range(start, start + share + (pp_rank in longer))


def kv_heads_of_rank(num_kv_heads: int, tp_size: int) -> int:
    """Key-value heads that a TP rank holds: its part of them, or one, which consecutive ranks hold together."""
    return max(1, num_kv_heads // tp_size)


def vocab_rows_of_rank(vocab_size: int, tp_size: int) -> int:
    """Rows of a TP rank's embedding; on the last rank those beyond the vocabulary are padding."""
    return -(-vocab_size // tp_size)
