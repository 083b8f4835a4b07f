"""The ways between ranks that are used at the start, for gloo_launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_adapters import runtime
from megatron_adapters.interface import Layout

Ways = set[tuple[str, tuple[int, ...]]]
"""What was called over which group (its global ranks), or with which global rank."""


def connected(layouts: Sequence[Layout]) -> list[list[Ways]]:
    """By layout and rank: what `connect` used."""
    return [_ways(layout) for layout in layouts]


def _ways(layout: Layout) -> list[Ways]:
    ranks = runtime.start(layout)
    used: Ways = set()
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "send", "recv")}

    def noting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, group: dist.ProcessGroup, **options: Any) -> Any:
            members = dist.get_process_group_ranks(group)
            peer = options.get("group_src", options.get("group_dst"))
            used.add((name, tuple(members) if peer is None else (members[peer],)))
            return real[name](*arguments, group=group, **options)

        return call

    for name in real:
        setattr(dist, name, noting(name))
    try:
        runtime.connect(ranks)
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    everyones: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyones, used, group=ranks.control_group)
    return everyones
