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
    """The decoder layers (from 0) of a stage: equal consecutive shares."""
    share = num_layers // layout.pp_size
    return range(pp_rank * share, (pp_rank + 1) * share)
