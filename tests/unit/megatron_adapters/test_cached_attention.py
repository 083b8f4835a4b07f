"""Attention through the cache equals attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_adapters.attention import PackedContext, packed_attention
from megatron_adapters.cached_attention import DecodeAttention, PrefillAttention, mark_filled
from megatron_adapters.kv_cache import KvCache, KvShape, LaneGroup

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 6, 2, 8, 2


def by_key_head(query_TQD: torch.Tensor) -> torch.Tensor:
    """[T, H, G, D]"""
    return query_TQD.unflatten(1, (KV_HEADS, -1))


@pytest.mark.parametrize("padding", [0, 3])
def test_prefill_and_steps_equal_one_pass_over_everything(padding: int) -> None:
    shape = KvShape(LAYERS, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache = KvCache(shape, budget_tokens=2048, max_context=512)
    generator = torch.Generator().manual_seed(0)
    prompts, steps = [1, 40, 7, 150], 30
    lengths = [prompt + steps for prompt in prompts]

    def random(heads: int) -> list[torch.Tensor]:
        return [torch.randn(LAYERS, length, heads, HEAD_DIM, generator=generator) for length in lengths]

    queries, keys, values = random(HEADS), random(KV_HEADS), random(KV_HEADS)

    def packed(tensors: list[torch.Tensor], layer: int, places: list[slice]) -> torch.Tensor:
        rows = torch.cat([tensor[layer, place] for tensor, place in zip(tensors, places, strict=True)])
        return torch.cat([rows, torch.full((padding, *rows.shape[1:]), 7.0)])

    # Two lanes continue prompt 1; lanes are of several lengths, and one released before the first step moves another.
    departed = cache.reserve(lengths[0])
    lanes = [[cache.reserve(length) for _ in range(2 if place == 1 else 1)] for place, length in enumerate(lengths)]
    assert departed is not None
    cache.release(departed, tainted=True)

    bounds = (0, 1, 41, 48, 198) + ((198 + padding,) if padding else ())
    context = PackedContext(bounds=bounds)
    whole = [
        torch.cat(
            [
                packed_attention(q[layer], k[layer], v[layer], PackedContext(bounds=(0, len(q[layer])))).unsqueeze(0)
                for layer in range(LAYERS)
            ]
        )
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    prefill = PrefillAttention(lanes)  # type: ignore[arg-type]
    head = [slice(0, prompt) for prompt in prompts]
    for layer in range(LAYERS):
        out = prefill.attend(
            layer + 1,
            by_key_head(packed(queries, layer, head)),
            packed(keys, layer, head),
            packed(values, layer, head),
            context,
        )
        expected = packed(whole, layer, head)
        torch.testing.assert_close(out[:198], expected[:198], atol=1e-6, rtol=0)
    for prompt, these in zip(prompts, lanes, strict=True):
        mark_filled(these, prompt)  # type: ignore[arg-type]

    order = [3, 1, 0, 1, 2]  # rows of a step in another order than the lanes
    taken = {place: iter(these) for place, these in enumerate(lanes)}
    attention = DecodeAttention([next(taken[place]) for place in order])  # type: ignore[misc]
    for step in range(steps):
        if step == steps // 2:  # somebody looks for room: the groups give up rows that they do not use, and move
            before = [group.mask_RC for group in cache.groups.values()]
            assert cache.reserve(512) is not None
            assert all(group.mask_RC is not mask for group, mask in zip(cache.groups.values(), before, strict=False))
        attention.begin([prompts[place] + step for place in order])
        here = [slice(prompts[place] + step, prompts[place] + step + 1) for place in order]
        for layer in range(LAYERS):
            q, k, v, expected = (
                packed([tensors[place] for place in order], layer, here) for tensors in (queries, keys, values, whole)
            )
            out = attention.attend(layer + 1, by_key_head(q), k, v, context)
            torch.testing.assert_close(out[: len(order)], expected[: len(order)], atol=1e-6, rtol=0)
            assert (out[len(order) :] == 0).all()


def test_a_group_that_grows_between_two_steps_lets_go_of_each_layer_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KvShape(LAYERS, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache = KvCache(shape, budget_tokens=2048, max_context=512)
    lanes = [lane for _ in range(4) if (lane := cache.reserve(10))]
    attention = DecodeAttention(lanes)  # lives on, as in own_sequences.py, while the next sequence looks for room
    attention.begin([3] * 4)
    for layer in range(LAYERS):
        new = torch.ones(4, KV_HEADS, HEAD_DIM)
        attention.attend(
            layer + 1, torch.ones(4, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM), new, new, PackedContext((0, 4))
        )

    group = lanes[0].group
    old = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*group.keys_RHCD, *group.values_RHCD)]
    alive: list[int] = []
    rows = LaneGroup._rows

    def noting(group: LaneGroup, num_rows: int, dim: int) -> torch.Tensor:
        alive.append(sum(not storage.expired() for storage in old))
        return rows(group, num_rows, dim)

    monkeypatch.setattr(LaneGroup, "_rows", noting)
    assert cache.reserve(10) is not None and group.num_rows == 8
    assert alive == [4, 3, 2, 1]
