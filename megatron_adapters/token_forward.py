"""The model as the decode loop sees it: two passes. sampler_forward.py is the real one.

Shapes: P prompt tokens, B rows of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .cached_attention import DecodeAttention
from .interface import Choices
from .kv_cache import Lane
from .sample_request import PromptScores, SampleRequest


@dataclass(frozen=True)
class PrefillRow:
    """A prompt to compute: its keys and values go to every lane that continues it (none where one token is wanted)."""

    request: SampleRequest
    lanes: list[Lane]
    scored: bool
    """Answer what the request asks about the prompt itself."""

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        return self.request.prompt

    @property
    def snapshot_id(self) -> str | None:
        return self.request.snapshot_id


@dataclass(frozen=True)
class Prefilled:
    """logits_BV after each prompt's last token; what was asked about the prompts."""

    logits_BV: Tensor
    scores: list[PromptScores | None]
    experts: list[Choices | None]
    """of the prompts that are to have them noted: [P, M, K]"""


class Decoded(NamedTuple):
    """logits_BV after these tokens; the experts that they went through, [B, M, K], where any is to have them noted."""

    logits_BV: Tensor
    experts_BMK: Choices | None = None


class TokenForward(Protocol):
    """The model, as this loop sees it. Rows of equal snapshot_id are neighbours. Both are collectives of a TP group."""

    def prefill(self, rows: Sequence[PrefillRow]) -> Prefilled: ...

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        snapshot_ids: Sequence[str | None],
        attention: DecodeAttention,
        *,
        note_experts: bool = False,
    ) -> Decoded:
        """What follows these tokens at these positions."""
        ...

    def join_others(self) -> None:
        """Called once an iteration, after its passes: wait until all ranks that share experts have done theirs."""
        ...
