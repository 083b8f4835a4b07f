"""What a caller asks of the sampler, and what it gets. Plain numpy and Python: equal on all ranks.

Shapes: P prompt tokens, N sampled tokens, K candidates, C cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from .interface import Choices

StopReason = Literal["stop", "length"]


@dataclass(frozen=True)
class PromptTargets:
    """Tokens to score along a prompt: `ids[c]` in place of prompt token `rows[c] + 1`."""

    rows: npt.NDArray[np.int64]
    """int64 [C], 0 to P - 2."""
    ids: npt.NDArray[np.int64]
    """int64 [C]; -1 asks for nothing."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Candidates at each place, and their logprobs."""

    token_ids: npt.NDArray[np.int32]
    """int32 [.., K]"""
    logprobs: npt.NDArray[np.float32]
    """float32 [.., K]"""


NO_TOKEN, NO_LOGPROB = 0, -99999.0
"""What a place without candidates holds (tinker's types/topk_logprobs.py)."""


@dataclass(frozen=True)
class SampleRequest:
    """`num_samples` continuations of one prompt."""

    snapshot_id: str | None
    """Weights to sample from; None is the base model without adapter."""
    prompt: npt.NDArray[np.int32]
    """int32 [P], at least one token."""
    num_samples: int = 1
    max_tokens: int | None = None
    """Sampled tokens at most; more than fit: up to the model's context; None: up to what the cache holds of it."""
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
    """Also the logprobs of the prompt's own tokens, at temperature 1, as all scores of a prompt."""
    prompt_logprobs_last_n: int | None = None
    """Only of so many tokens at its end; also of `topk_prompt_logprobs`. None: all but the first."""
    topk_prompt_logprobs: int = 0
    """K most probable tokens in place of each prompt token."""
    topk_sample_logprobs: int = 0
    """K most probable tokens in place of each sampled one, of the distribution its own logprob is of."""
    target_prompt_logprobs: PromptTargets | None = None
    prompt_alt_tokens_k: int = 0
    """K tokens drawn at the request's temperature, without top-k and top-p, in place of each prompt token."""

    note_experts: bool = False
    """Also the experts that every token went through, of the prompt and of what is sampled."""

    @property
    def scores_prompt(self) -> bool:
        """Whether anything is asked about the prompt itself."""
        return (
            self.prompt_logprobs
            or self.topk_prompt_logprobs > 0
            or self.target_prompt_logprobs is not None
            or self.prompt_alt_tokens_k > 0
        )


@dataclass(frozen=True)
class RoutedExperts:
    """What the routers chose for the tokens of one sequence that went through the model: all but the last."""

    prompt: Choices
    """[P, M, K]; one array for samples whose prompt was computed once"""
    sampled: Choices
    """[N - 1, M, K]"""


@dataclass(frozen=True)
class SampledSequence:
    """tokens int32 [N], logprobs float32 [N] (temperature-scaled, before top-k and top-p), why it ended."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    stop_reason: StopReason
    topk: TokenLogprobs | None = None
    """[N, K], most probable first."""
    experts: RoutedExperts | None = None


@dataclass(frozen=True)
class PromptScores:
    """What was asked about a prompt; None where it was not. Natural logs at temperature 1."""

    logprobs: npt.NDArray[np.float32] | None = None
    """float32 [P], NaN where not scored: the first always."""
    topk: TokenLogprobs | None = None
    """[P, K], most probable first; NO_TOKEN and NO_LOGPROB where not scored."""
    targets: npt.NDArray[np.float32] | None = None
    """float32 [C], 0 where nothing was asked."""
    alternatives: TokenLogprobs | None = None
    """[P - 1, K], in the order they were drawn."""


@dataclass(frozen=True)
class SampleResult:
    """One request's answer: `error` alone where the request cannot be served, else one sequence a sample."""

    sequences: list[SampledSequence] = field(default_factory=list)
    prompt: PromptScores | None = None
    """None where nothing was asked about the prompt."""
    error: str | None = None
    """Only this request failed; the message says what to change."""

    @property
    def prompt_logprobs(self) -> npt.NDArray[np.float32] | None:
        return None if self.prompt is None else self.prompt.logprobs


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
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        if not 0 <= getattr(request, name) <= vocab_size:
            return f"{name} is {getattr(request, name)}; expected 0 (off) to {vocab_size}, the size of the vocabulary"
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and not 1 <= last_n < prompt.size:
        return f"prompt_logprobs_last_n is {last_n}; expected 1 to {prompt.size - 1} for a prompt of {prompt.size}"
    targets = request.target_prompt_logprobs
    if targets is not None and targets.ids.size:
        low, high = int(targets.ids.min()), int(targets.ids.max())
        if low < -1 or high >= vocab_size:
            return f"target_prompt_logprobs has ids {low} to {high}; expected -1 (nothing asked) to {vocab_size - 1}"
        if targets.rows.min() < 0 or targets.rows.max() > prompt.size - 2:
            rows = f"rows {targets.rows.min()} to {targets.rows.max()}"
            return (
                f"target_prompt_logprobs has {rows}; a prompt of {prompt.size} tokens has rows 0 to {prompt.size - 2}"
            )
    if any(not text for text in request.stop_strings):
        return "stop holds an empty string, which every text contains: remove it"
    return None


def most_tokens(request: SampleRequest, max_context: int) -> int:
    """How many tokens one sample may have. The last is never fed back, so a full prompt still yields one."""
    room = max(1, max_context - len(request.prompt))
    return room if request.max_tokens is None else min(request.max_tokens, room)
