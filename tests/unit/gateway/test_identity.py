"""Tokens stand for the key until they expire, and nothing else does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tinker.lib._jwt_auth import jwt_claims

from tinker_hpc.gateway.identity import TOKEN_LIFETIME_S, issue_token, may_ask, user_urn

KEY, NOW = "tml-of-a-run", 1_800_000_000.0


def test_the_key_and_its_tokens_may_ask():
    token = issue_token(KEY, NOW)
    assert may_ask(KEY, KEY, NOW) and may_ask(KEY, token, NOW)
    assert may_ask(KEY, token, NOW + TOKEN_LIFETIME_S - 1)
    assert not may_ask(KEY, token, NOW + TOKEN_LIFETIME_S)
    assert not may_ask("tml-of-another-run", token, NOW)


def test_the_sdk_reads_who_it_is():
    claims = jwt_claims(issue_token(KEY, NOW))
    assert claims["sub"] == user_urn() and claims["org_id"] and claims["exp"] - claims["iat"] == TOKEN_LIFETIME_S


@given(st.text(), st.integers(0, 400), st.integers(0, 127))
def test_nothing_else_may(text, at, code):
    token = issue_token(KEY, NOW)
    at %= len(token)
    changed = token[:at] + chr(code) + token[at + 1 :]
    for presented in (text, f"eyJ{text}", changed if changed != token else "", token.rpartition(".")[0], KEY[:-1]):
        assert presented == KEY or not may_ask(KEY, presented, NOW)
