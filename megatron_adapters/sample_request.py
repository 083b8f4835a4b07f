"""What a caller asks of the sampler, and what it gets. Plain numpy and Python: equal on all ranks.

Shapes: P prompt tokens, N sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

StopReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SampleRequest:
    """`num_samples` continuations of one prompt."""

    snapshot_id: str | None
    """Weights to sample from; None is the base model without adapter."""
    prompt: npt.NDArray[np.int32]
    """int32 [P], at least one token."""
    num_samples: int = 1
    max_tokens: int | None = None
    """Sampled tokens at most; None, or more than fit: up to the model's context."""
    temperature: float = 1.0
    """0 is greedy; the logprobs of a greedy request are those at temperature 1."""
    top_k: int = -1
    """Below 1 is off."""
    top_p: float = 1.0
    seed: int = 0
    """With the sample's index and the step it gives every random number (philox.py): same seed, same tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """Any of these ends the sequence and is its last token. End-of-sequence is the caller's to add."""
    stop_strings: tuple[str, ...] = ()
    """Any of these in the decoded text of the sampled tokens ends the sequence; the completing token stays."""
    prompt_logprobs: bool = False
    """Also the logprobs of the prompt's own tokens, at temperature 1."""


@dataclass(frozen=True)
class SampledSequence:
    """tokens int32 [N], logprobs float32 [N] (temperature-scaled, before top-k and top-p), why it ended."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    stop_reason: StopReason


@dataclass(frozen=True)
class SampleResult:
    """One request's answer: `error` alone where the request cannot be served, else one sequence a sample."""

    sequences: list[SampledSequence] = field(default_factory=list)
    prompt_logprobs: npt.NDArray[np.float32] | None = None
    """float32 [P], the first NaN; None where not asked for."""
    error: str | None = None
    """Only this request failed; the message says what to change."""


def refusal(request: SampleRequest, *, vocab_size: int, max_context: int) -> str | None:
    """Why this request can never be served by this model, or None. Says what was given and what was expected."""
    prompt = np.asarray(request.prompt)
    if prompt.ndim != 1 or prompt.size == 0:
        return f"prompt has shape {list(prompt.shape)}; expected at least one token in one dimension"
    if prompt.size > max_context:
        return f"prompt has {prompt.size} tokens, the model's context holds {max_context}: shorten the prompt"
    beyond = prompt[(prompt < 0) | (prompt >= vocab_size)]
    if beyond.size:
        return f"prompt holds token id {beyond[0]}; expected 0 to {vocab_size - 1}: is this the model's own tokenizer?"
    if request.num_samples < 1:
        return f"num_samples is {request.num_samples}; expected at least 1"
    if request.max_tokens is not None and request.max_tokens < 0:
        return f"max_tokens is {request.max_tokens}; expected at least 0, or none for as many as the context holds"
    if not (np.isfinite(request.temperature) and request.temperature >= 0):
        return f"temperature is {request.temperature}; expected a finite number, 0 (greedy) or more"
    if not 0 < request.top_p <= 1:
        return f"top_p is {request.top_p}; expected more than 0 and at most 1 (1 is off)"
    if any(not text for text in request.stop_strings):
        return "stop holds an empty string, which every text contains: remove it"
    return None


def most_tokens(request: SampleRequest, max_context: int) -> int:
    """How many tokens one sample may have. The last is never fed back, so a full prompt still yields one."""
    room = max(1, max_context - len(request.prompt))
    return room if request.max_tokens is None else min(request.max_tokens, room)
