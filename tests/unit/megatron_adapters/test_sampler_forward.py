"""Which weights a pass of the sampler says its rows use: those live on some rank, and none for the padding alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_adapters import sampler_forward
from megatron_adapters.adapters import LoraWeights
from megatron_adapters.interface import Layout
from megatron_adapters.lora_linear import Segment
from megatron_adapters.sampler_forward import ModelForward

SNAPSHOTS = {name: LoraWeights(4, 32.0, (), {}) for name in ("c", "a", "b", "d")}
NAMES = {id(lora): name for name, lora in SNAPSHOTS.items()}
Weights = str | None


class Model:
    """Writes down, of each pass, its segments and its table, by name."""

    def __init__(self, layout: Layout) -> None:
        self.runtime = SimpleNamespace(device=torch.device("cpu"), layout=layout, control_group=None)
        self.head = SimpleNamespace(logits=lambda hidden_BD, segments: hidden_BD)
        self.segments: list[list[tuple[Weights, int, int]]] = []
        self.tables: list[list[Weights] | None] = []

    def padded_length(self, num_tokens: int) -> int:
        return max(-(-num_tokens // self.runtime.layout.tp_size), 1) * self.runtime.layout.tp_size

    def context(self, *_: object) -> None:
        return None

    def hidden_states(self, tokens_T: Tensor, _: object, segments: list[Segment], table: Any, *__: object) -> Tensor:
        self.segments.append([(NAMES.get(id(lora)), start, end) for lora, start, end in segments])
        self.tables.append(None if table is None else [NAMES.get(id(lora)) for lora in table])
        return torch.zeros(len(tokens_T), 1)


def decode(forward: ModelForward, *snapshot_ids: Weights) -> None:
    zeros = [0] * len(snapshot_ids)
    forward.decode(zeros, zeros, snapshot_ids, None)  # type: ignore[arg-type]


def make(layout: Layout) -> tuple[Model, ModelForward]:
    model = Model(layout)
    return model, ModelForward(model, SNAPSHOTS)  # type: ignore[arg-type]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that meet in each all-reduce."""
    barrier, parts = Barrier(2, timeout=20), list[Tensor]()

    def all_reduce(tensor: Tensor, *_: object, **__: object) -> None:
        parts.append(tensor.clone())
        barrier.wait()
        tensor.copy_(torch.stack(parts).amax(0))
        if barrier.wait() == 0:
            parts.clear()
        barrier.wait()

    monkeypatch.setattr(sampler_forward.dist, "all_reduce", all_reduce)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (([("b", "b")], []), [["b"]]),
        (([(None,)], []), [[None]]),
        (([("b", "d")], [("a", "b")]), [["a", "b", "d"]]),
        (([(None, "b")], [("c",), ("b",)]), [[None, "b", "c"], ["b"]]),
        (([], []), []),
    ],
)
def test_a_table_holds_what_is_live_on_any_rank(
    passes: tuple[list[tuple[Weights, ...]], ...], expected: list[list[Weights]]
) -> None:
    ranks = [make(Layout(dp_size=2, ep_size=2)) for _ in passes]

    def iterate(rank: int) -> None:
        _, forward = ranks[rank]
        for snapshot_ids in passes[rank]:
            decode(forward, *snapshot_ids)
        forward.join_others()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(iterate, range(2)))
    for model, _ in ranks:
        assert model.tables == expected, "the same on every rank, one for every pass of the busiest"
        for segments, table in zip(model.segments, expected, strict=True):
            assert {name for name, _, _ in segments} <= set(table)


@pytest.mark.parametrize(
    ("snapshot_ids", "expected"),
    [
        (("b",), [("b", 0, 2)]),
        ((None, None, None), [(None, 0, 4)]),
        ((None, "a", "a"), [(None, 0, 1), ("a", 1, 4)]),
        ((None, "a"), [(None, 0, 1), ("a", 1, 2)]),
    ],
)
def test_padding_goes_with_the_last_row(
    snapshot_ids: tuple[Weights, ...], expected: list[tuple[Weights, int, int]]
) -> None:
    """So that ranks which share experts within a copy have a step of one adapter as such."""
    model, forward = make(Layout(tp_size=2, ep_size=2))
    decode(forward, *snapshot_ids)
    forward.join_others()
    assert model.segments == [expected] and model.tables == [None]
