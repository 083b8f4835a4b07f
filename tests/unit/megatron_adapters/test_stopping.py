"""When a sequence ends."""

from __future__ import annotations

from megatron_adapters.stopping import StopRule

PIECES = ["a", "b", "END", "E", "ND", " ", "é"]


def decode_text(tokens: list[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


def reasons(rule: StopRule, tokens: list[int]) -> list[str | None]:
    return [rule.reason(tokens[: i + 1]) for i in range(len(tokens))]


def test_stop_token_ends_and_wins_over_length() -> None:
    rule = StopRule(frozenset({1}), (), 3, None)
    assert reasons(rule, [0, 0, 1]) == [None, None, "stop"]
    assert reasons(rule, [0, 0, 0]) == [None, None, "length"]


def test_stop_string_over_several_tokens() -> None:
    rule = StopRule(frozenset(), ("bEND",), 100, decode_text)
    assert reasons(rule, [0, 1, 3, 4]) == [None, None, None, "stop"]
    assert reasons(rule, [0, 1, 5, 3, 4]) == [None] * 5


def test_stop_string_after_a_long_text_is_found_in_the_window() -> None:
    rule = StopRule(frozenset(), ("éE",), 10_000, decode_text)
    assert rule.reason([0] * 5000 + [6, 3]) == "stop"
    assert rule.reason([0] * 5000 + [6, 4]) is None


def test_any_of_several_strings() -> None:
    rule = StopRule(frozenset(), ("zzz", "ab"), 10, decode_text)
    assert reasons(rule, [1, 0, 1]) == [None, None, "stop"]
