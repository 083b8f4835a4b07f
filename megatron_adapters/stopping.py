"""When a sampled sequence ends: a stop token, a stop string in its text, or its length.

A stop token or the tokens that complete a stop string are part of the sequence, as Tinker's renderers expect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .sample_request import StopReason

DecodeText = Callable[[list[int]], str]
"""Token ids to text, special tokens kept, so that every token adds at least one byte."""

_MARGIN = 8  # tokens before the window's start: the first may be half a character or lose its leading space


@dataclass(frozen=True)
class StopRule:
    """One request's rule; asked after every token."""

    token_ids: frozenset[int]
    strings: tuple[str, ...]
    max_tokens: int
    decode_text: DecodeText | None
    """Needed only with strings."""

    def reason(self, tokens: Sequence[int]) -> StopReason | None:
        """Why the sequence ends with its newest token, or None. "stop" wins over "length"."""
        if tokens and tokens[-1] in self.token_ids:
            return "stop"
        if self.strings and tokens and self._string_completed(tokens):
            return "stop"
        return "length" if len(tokens) >= self.max_tokens else None

    def _string_completed(self, tokens: Sequence[int]) -> bool:
        # Asked after every token, so a string that is there now was completed by the newest: the last few tokens
        # hold all of it, as a token is at least one byte of text.
        assert self.decode_text is not None
        longest = max(len(text.encode()) for text in self.strings)
        text = self.decode_text(list(tokens[-(longest + _MARGIN) :]))
        return any(string in text for string in self.strings)
