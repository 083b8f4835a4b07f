"""The loop of continuous batching with a made-up model: the next token's logits are a known function of the history."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_adapters.cached_attention import DecodeAttention
from megatron_adapters.decode import Decoder
from megatron_adapters.kv_cache import KvCache, KvShape
from megatron_adapters.sample_ranks import SampleRanks
from megatron_adapters.sample_request import PromptScores, PromptTargets, SampleRequest, SampleResult
from megatron_adapters.stopping import DecodeText
from megatron_adapters.token_forward import Decoded, Prefilled, PrefillRow
from megatron_adapters.token_sampler import Draw

VOCABULARY = 50
SHAPE = KvShape(num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))


def logits_after(snapshot_id: str | None, position: int, token: int) -> Tensor:
    """Depends on the weights, the position and the last token; "diverged" gives NaN."""
    if snapshot_id == "diverged":
        return torch.full((VOCABULARY,), float("nan"))
    seed = 1000 * position + token + 7_000_000 * len(snapshot_id or "")
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


class Forward:
    """Writes down the sizes of its passes."""

    def __init__(self) -> None:
        self.prefills: list[list[int]] = []
        self.steps: list[list[str | None]] = []

    def prefill(self, rows: Sequence[PrefillRow]) -> Prefilled:
        self.prefills.append([len(row.tokens) for row in rows])
        logits = [logits_after(row.snapshot_id, len(row.tokens) - 1, int(row.tokens[-1])) for row in rows]
        scores = [PromptScores(np.arange(len(row.tokens), dtype=np.float32)) if row.scored else None for row in rows]
        return Prefilled(torch.stack(logits), scores, [None] * len(rows))

    def join_others(self) -> None:
        pass

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        snapshot_ids: Sequence[str | None],
        attention: DecodeAttention,
        *,
        note_experts: bool = False,
    ) -> Decoded:
        self.steps.append(list(snapshot_ids))
        rows = zip(snapshot_ids, positions, tokens, strict=True)
        return Decoded(torch.stack([logits_after(snapshot, position, token) for snapshot, position, token in rows]))


def make_decoder(budget_tokens: int = 10_000, max_rows: int = 64) -> tuple[Decoder, Forward, KvCache]:
    forward = Forward()
    cache = KvCache(SHAPE, budget_tokens, max_context=256, max_rows=max_rows)
    decoder = Decoder(
        forward,
        cache,
        SampleRanks(),
        vocab_size=VOCABULARY,
        known_snapshots=lambda: ["a", "bb", "diverged"],
        decode_text=lambda: lambda tokens: "".join(chr(97 + token % 26) for token in tokens),
        prefill_tokens=64,
    )
    return decoder, forward, cache


def request(prompt: Sequence[int] = (3, 1), **changes) -> SampleRequest:
    fields = {"snapshot_id": None, "num_samples": 1, "max_tokens": 6, "seed": 9} | changes
    return SampleRequest(prompt=np.array(prompt, dtype=np.int32), **fields)


def targets(rows: Sequence[int], ids: Sequence[int]) -> PromptTargets:
    return PromptTargets(np.array(rows, np.int64), np.array(ids, np.int64))


def tokens_of(result: SampleResult) -> list[list[int]]:
    assert result.error is None, result.error
    return [sequence.tokens.tolist() for sequence in result.sequences]


def test_greedy_follows_the_model() -> None:
    decoder, _, cache = make_decoder()
    [result] = decoder.run([request([3, 1, 4], temperature=0.0, max_tokens=10)])
    expected, last = [], 4
    for position in range(2, 12):
        last = int(logits_after(None, position, last).argmax())
        expected.append(last)
    assert tokens_of(result) == [expected]
    sequence = result.sequences[0]
    assert sequence.stop_reason == "length" and cache.num_live() == 0
    logprobs = [
        torch.log_softmax(logits_after(None, position, before), 0)[token].item()
        for position, before, token in zip(range(2, 12), [4, *expected], expected, strict=False)
    ]
    np.testing.assert_allclose(sequence.logprobs, logprobs, atol=1e-6)
    assert sequence.tokens.dtype == np.int32 and sequence.logprobs.dtype == np.float32


def mixed_requests() -> list[SampleRequest]:
    return [
        request(
            [1] * length, snapshot_id=weights, num_samples=samples, max_tokens=tokens, seed=length, temperature=heat
        )
        for length, weights, samples, tokens, heat in [
            (5, "bb", 3, 9, 1.0),
            (40, None, 1, 20, 0.7),
            (30, "a", 2, 1, 1.0),
            (9, "bb", 1, 0, 1.0),
            (100, "a", 4, 30, 1.3),
            (2, None, 5, 17, 0.0),
        ]
    ]


@pytest.mark.parametrize(("budget_tokens", "max_rows"), [(10_000, 64), (256, 64), (10_000, 2)])
def test_a_request_gets_the_same_tokens_alone_and_in_any_crowd(budget_tokens: int, max_rows: int) -> None:
    together = make_decoder(budget_tokens, max_rows)[0].run(mixed_requests())
    for one, crowded in zip(mixed_requests(), together, strict=True):
        [alone] = make_decoder()[0].run([one])
        assert tokens_of(alone) == tokens_of(crowded)
        assert len(alone.sequences) == one.num_samples
        for mine, other in zip(alone.sequences, crowded.sequences, strict=True):
            assert mine.logprobs.tolist() == other.logprobs.tolist() and mine.stop_reason == other.stop_reason
    assert len({tuple(tokens) for tokens in tokens_of(together[0])}) == 3, "samples of a request differ"


def test_same_seed_same_tokens_another_seed_others() -> None:
    decoder, _, _ = make_decoder()
    first, again, other = decoder.run([request(seed=seed, max_tokens=20) for seed in (1, 1, 2)])
    assert tokens_of(first) == tokens_of(again) != tokens_of(other)


def test_prompt_is_computed_once_for_all_its_samples_and_weights_are_neighbours() -> None:
    decoder, forward, _ = make_decoder()
    decoder.run([request(snapshot_id=weights, num_samples=4) for weights in ("bb", "a", "bb", None)])
    assert forward.prefills == [[2, 2, 2, 2]]
    for snapshot_ids in forward.steps:
        assert snapshot_ids == sorted(snapshot_ids, key=lambda name: (name is not None, name or ""))
    assert len(forward.steps[0]) == 16


def test_prompts_are_packed_up_to_the_limit_and_a_long_one_goes_alone() -> None:
    decoder, forward, _ = make_decoder()
    decoder.run([request([1] * length, max_tokens=2) for length in (30, 30, 30, 100, 5)])
    assert forward.prefills == [[30, 30], [30], [100], [5]]


def test_between_two_packs_of_prompts_the_others_go_on_and_are_heard() -> None:
    """Samples of one token need no lane, so nothing but this stops them from being computed all at once."""
    decoder, forward, _ = make_decoder()
    passes: list[tuple[int, int]] = []
    answered_after: list[int] = []

    def admit() -> list[SampleRequest]:
        passes.append((len(forward.prefills), len(forward.steps)))
        return [request([1] * 60, max_tokens=1, prompt_logprobs=True) for _ in range(20)] if len(passes) == 3 else []

    decoder.run([request(max_tokens=15)], lambda *_: answered_after.append(len(forward.prefills)), admit)
    assert len(forward.prefills) == 21
    between = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(passes)]
    assert between == [(1, 1), (0, 1), *[(1, 1)] * 12, *[(1, 0)] * 8]
    assert sorted(answered_after) == [*range(2, 14), 13, *range(14, 22)], "each is answered after its own pass"


def test_no_draw_is_wider_than_the_row_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of one token takes no lane, but a row of logits as any other."""
    widths: list[int] = []
    whole = Draw.__call__

    def noting(draw: Draw, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        widths.append(logits_BV.shape[0])
        return whole(draw, logits_BV)

    monkeypatch.setattr(Draw, "__call__", noting)
    decoder, forward, _ = make_decoder(max_rows=8)
    asked = [request(max_tokens=1, num_samples=20, seed=1), request(max_tokens=0, num_samples=3), request()]
    results = decoder.run([*asked, *[request([place], max_tokens=1, seed=place) for place in range(30)]])
    assert max(widths) == 8 and max(len(lengths) for lengths in forward.prefills) == 8
    for one, result in zip(asked, results, strict=False):
        assert len(result.sequences) == one.num_samples
        assert tokens_of(result) == tokens_of(make_decoder()[0].run([one])[0])


def test_waiting_requests_take_the_lanes_of_finished_ones_in_order() -> None:
    decoder, forward, _ = make_decoder(max_rows=2)
    answers: dict[int, SampleResult] = {}
    decoder.run([request(max_tokens=tokens) for tokens in (8, 3, 4, 4)], on_finished=answers.__setitem__)
    assert list(answers) == [1, 2, 0, 3]
    assert [len(answers[index].sequences[0].tokens) for index in range(4)] == [8, 3, 4, 4]
    assert all(len(step) <= 2 for step in forward.steps) and len(forward.steps) <= 9


def test_who_asks_for_much_does_not_hold_back_what_fits_beside_it() -> None:
    decoder, forward, _ = make_decoder(budget_tokens=2 * 256 + 64)
    finished: list[int] = []
    steps: list[int] = []

    def on_finished(index: int, _: SampleResult) -> None:
        finished.append(index)
        steps.append(len(forward.steps))

    long, short = request(snapshot_id="a", max_tokens=200), request(snapshot_id="bb", max_tokens=3)
    decoder.run([*[long] * 10, *[short] * 4], on_finished)
    assert finished == [10, 11, 12, 13, *range(10)] and steps[3] <= 4 * 3


def test_who_comes_while_all_room_is_taken_has_the_next_turn() -> None:
    decoder, _, _ = make_decoder(budget_tokens=2 * 256)
    arrivals = [[], [], [request(snapshot_id="bb", max_tokens=3)] * 4]
    finished: list[int] = []
    decoder.run(
        [request(snapshot_id="a", max_tokens=200)] * 6,
        on_finished=lambda index, _: finished.append(index),
        admit=lambda: arrivals.pop(0) if arrivals else [],
    )
    assert finished == [0, 1, 6, 7, 8, 9, 2, 3, 4, 5]


def test_who_needs_all_room_has_a_turn_however_many_small_ones_come() -> None:
    decoder, forward, _ = make_decoder(budget_tokens=256)
    small, large = request(snapshot_id="bb", max_tokens=20), request(snapshot_id="a", max_tokens=200)
    num_admits = 0
    finished: list[int] = []

    def admit() -> list[SampleRequest]:
        nonlocal num_admits
        num_admits += 1
        if num_admits == 30:
            return [small, large]
        return [small] if num_admits < 120 else []

    errors: list[str | None] = []

    def on_finished(index: int, result: SampleResult) -> None:
        finished.append(index)
        errors.append(result.error)

    decoder.run([], on_finished, admit)
    asked = next(step for step, snapshot_ids in enumerate(forward.steps) if "a" in snapshot_ids)
    assert 30 < asked <= 30 + 2 * 20, "the small ones under way end, and those that were started before them"
    assert len(set(finished)) == 120 and errors == [None] * 120


def test_requests_admitted_between_steps_join_the_batch() -> None:
    decoder, forward, _ = make_decoder()
    arrivals = [[], [], [request(max_tokens=3, seed=4)], []]
    answers: dict[int, SampleResult] = {}
    decoder.run([request(max_tokens=8)], answers.__setitem__, admit=lambda: arrivals.pop(0) if arrivals else [])
    assert list(answers) == [1, 0]
    assert tokens_of(answers[1]) == tokens_of(make_decoder()[0].run([request(max_tokens=3, seed=4)])[0])
    assert max(len(step) for step in forward.steps) == 2


def test_fewer_at_a_time_is_for_the_first_requests_and_not_for_those_that_join() -> None:
    decoder, forward, _ = make_decoder()
    arrivals = [[], [request(max_tokens=4) for _ in range(5)]]
    answers: dict[int, SampleResult] = {}
    first = [request(max_tokens=5), request(max_tokens=5)]
    decoder.run(first, answers.__setitem__, lambda: arrivals.pop(0) if arrivals else [], max_live=1)
    assert list(answers) == list(range(7))
    assert [len(step) for step in forward.steps] == [1] * 8 + [5] * 3


def test_an_answer_that_was_handed_over_is_kept_by_nobody() -> None:
    decoder, _, _ = make_decoder()
    alive: list[weakref.ref[SampleResult]] = []
    left: list[int] = []

    def admit() -> list[SampleRequest]:
        left.append(sum(answer() is not None for answer in alive))
        return [request(max_tokens=1)] if len(left) < 20 else []

    run = decoder.run([request(max_tokens=1)], lambda _, result: alive.append(weakref.ref(result)), admit)
    assert run == [] and len(alive) == 20 and max(left) == 0


def test_a_cancelled_request_leaves_at_once_and_the_others_do_not_notice() -> None:
    decoder, forward, cache = make_decoder(max_rows=4)
    kept = request(max_tokens=20, seed=5)
    running, waiting, short = request(max_tokens=30, num_samples=2), request(num_samples=9), request(max_tokens=2)
    answers: dict[int, SampleResult] = {}
    steps: list[int] = []

    def admit() -> list[SampleRequest]:
        steps.append(len(forward.steps))
        if len(steps) == 4:
            decoder.cancel(0, "not wanted")
            decoder.cancel(2, "not wanted")
        if len(steps) == 10:
            decoder.cancel(3, "too late")
        return []

    decoder.run([running, kept, waiting, short], answers.__setitem__, admit)
    assert [answers[index].error for index in range(4)] == ["not wanted", None, "not wanted", None]
    assert list(answers) == [0, 2, 3, 1] and cache.num_live() == 0
    assert tokens_of(answers[1]) == tokens_of(make_decoder()[0].run([kept])[0])
    assert [len(step) for step in forward.steps[:3]] == [4, 4, 4] and {len(s) for s in forward.steps[5:]} == {1}


def test_stop_token_is_the_last_and_stop_string_is_found() -> None:
    decoder, _, _ = make_decoder()
    [free] = decoder.run([request(max_tokens=30)])
    tokens = tokens_of(free)[0]
    on_token, on_string, on_nothing = decoder.run(
        [
            request(max_tokens=30, stop_token_ids=frozenset({tokens[4]})),
            request(max_tokens=30, stop_strings=("~", "".join(chr(97 + token % 26) for token in tokens[10:13]))),
            request(max_tokens=30, stop_strings=("~",)),
        ]
    )
    end = tokens.index(tokens[4]) + 1
    assert tokens_of(on_token) == [tokens[:end]] and on_token.sequences[0].stop_reason == "stop"
    assert tokens_of(on_string) == [tokens[:13]] and on_string.sequences[0].stop_reason == "stop"
    assert tokens_of(on_nothing) == [tokens] and on_nothing.sequences[0].stop_reason == "length"


def test_a_tokenizer_that_does_not_load_fails_only_what_needs_it() -> None:
    """As tokenizers says that a tokenizer.json is wrong: neither an OSError nor a ValueError."""
    decoder, _, _ = make_decoder()

    def broken() -> DecodeText:
        raise Exception("data did not match any variant of untagged enum ModelWrapper")

    decoder._decode_text = broken
    on_string, on_token = decoder.run([request(stop_strings=("~",)), request(stop_token_ids=frozenset({4}))])
    assert on_string.error is not None and "did not load: Exception: data did not match any variant" in on_string.error
    assert on_token.error is None and on_token.sequences


def test_length_without_a_wish_is_the_context_and_a_full_prompt_still_gets_one_token() -> None:
    decoder, _, cache = make_decoder()
    unlimited, full = decoder.run(
        [
            request([1] * 250, max_tokens=None),
            request([1] * 256, max_tokens=5, prompt_logprobs=True),
        ]
    )
    assert len(unlimited.sequences[0].tokens) == 6
    assert len(full.sequences[0].tokens) == 1 and full.prompt_logprobs is not None
    assert cache.groups.keys() == {256}, "a single token needs no lane"


def test_length_without_a_wish_is_what_a_cache_smaller_than_the_context_holds() -> None:
    decoder, _, _ = make_decoder(budget_tokens=128)
    free, wished, too_long, recorded, single = decoder.run(
        [
            request([1] * 100, max_tokens=None, num_samples=2),
            request([1] * 100, max_tokens=28),
            request([1] * 129, max_tokens=None),
            request([1] * 100, max_tokens=156),  # what a gateway wrote in the user's place until 2026-11
            request([1] * 129, max_tokens=1),
        ]
    )
    assert [len(tokens) for tokens in tokens_of(free)] == [28, 28] and free.sequences[0].stop_reason == "length"
    assert tokens_of(wished)[0] == tokens_of(free)[0]
    assert too_long.error is not None and "no max_tokens given; this worker's memory holds 128" in too_long.error
    assert recorded.error is not None and "max_tokens 156 need 255 cached tokens" in recorded.error
    assert len(tokens_of(single)[0]) == 1, "one token needs no lane"


def test_prompt_logprobs_only_where_asked_for() -> None:
    decoder, _, _ = make_decoder(max_rows=2)
    scored, plain = decoder.run([request(prompt_logprobs=True, num_samples=5), request()])
    assert scored.prompt_logprobs is not None and scored.prompt_logprobs.tolist() == [0.0, 1.0]
    assert plain.prompt_logprobs is None and len(scored.sequences) == 5


def test_candidates_of_each_sampled_token() -> None:
    decoder, _, _ = make_decoder()
    asking = request([3, 1, 4], temperature=0.5, max_tokens=5, topk_sample_logprobs=3, num_samples=2)
    wider = request([5], topk_sample_logprobs=VOCABULARY, max_tokens=2)
    three, whole, plain = decoder.run([asking, wider, request()])
    for sequence in three.sequences:
        assert sequence.topk is not None and sequence.topk.token_ids.shape == (5, 3)
        before = [4, *sequence.tokens.tolist()]
        for step in range(5):
            expected = torch.log_softmax(logits_after(None, 2 + step, before[step]) / 0.5, 0).topk(3)
            assert sequence.topk.token_ids[step].tolist() == expected.indices.tolist()
            np.testing.assert_allclose(sequence.topk.logprobs[step], expected.values, atol=1e-6)
    assert tokens_of(three) == tokens_of(make_decoder()[0].run([request([3, 1, 4], temperature=0.5, max_tokens=5,
        num_samples=2)])[0]), "asking changes nothing"  # fmt: skip
    topk = whole.sequences[0].topk
    assert topk is not None and topk.token_ids.shape == (2, VOCABULARY)
    np.testing.assert_allclose(np.exp(topk.logprobs).sum(1), 1, atol=1e-5)
    place = topk.token_ids[0].tolist().index(whole.sequences[0].tokens[0])
    np.testing.assert_allclose(topk.logprobs[0, place], whole.sequences[0].logprobs[0], atol=1e-6)
    assert plain.sequences[0].topk is None


def test_a_bad_request_fails_alone_and_says_what_to_change() -> None:
    decoder, _, cache = make_decoder(budget_tokens=128)
    bad = {
        "at least one token": request([]),
        "expected 0 to 49": request([50]),
        "'c' are not loaded": request(snapshot_id="c"),
        "shorten the prompt or lower max_tokens": request([1] * 100, max_tokens=100),
        "context holds 256": request([1] * 257),
        "not finite": request(snapshot_id="diverged", num_samples=3),
        "num_samples is 0": request(num_samples=0),
        "max_tokens is -1": request(max_tokens=-1),
        "temperature is nan": request(temperature=float("nan")),
        "top_p is 0.0": request(top_p=0.0),
        "empty string": request(stop_strings=("",)),
        "topk_sample_logprobs is 51; expected 0 (off) to 50": request(topk_sample_logprobs=51),
        "prompt_logprobs_last_n is 2; expected 1 to 1": request(prompt_logprobs=True, prompt_logprobs_last_n=2),
        "target_prompt_logprobs has ids -2 to 7": request(target_prompt_logprobs=targets([0], [-2, 7])),
        "a prompt of 2 tokens has rows 0 to 0": request(target_prompt_logprobs=targets([0, 1], [3, 4])),
    }
    results = decoder.run([*bad.values(), request()])
    for message, result in zip(bad, results, strict=False):
        assert result.error is not None and message in result.error and not result.sequences
    assert results[-1].error is None and len(results) == len(bad) + 1
    assert cache.num_live() == 0


def test_lanes_are_free_again_after_an_exception() -> None:
    decoder, forward, cache = make_decoder()

    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("out of memory")

    whole, forward.decode = forward.decode, broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.run([request()])
    assert cache.num_live() == 0
    forward.decode = whole  # type: ignore[method-assign]
    assert len(decoder.run([request()])) == 1
