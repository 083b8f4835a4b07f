"""From logits to the next token of every row: temperature, then top-k, then top-p, then one draw.

The order is vLLM's (and Tinker's). The logprob that goes with a token is that of the temperature-scaled distribution
*before* top-k and top-p cut it (TINKER's cookbook checks exactly this); a greedy row (temperature 0) takes the lowest
token id among the largest logits and reports its logprob at temperature 1. Pure: randomness comes in as `uniforms`.

Shapes: B rows, V vocabulary, C chunks of the vocabulary, W width of a chunk, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .sample_request import TokenLogprobs

NOT_FINITE = -1  # the token of a row whose logits hold a NaN or +inf: the adapter has diverged

_CHUNK_WIDTH = 256
_FIRST_CANDIDATES = 1024  # top-p rarely needs more; the whole vocabulary is sorted only where it does


@dataclass(frozen=True)
class SamplingRows:
    """Parameters of a batch, one entry a row. On the host: what to do is then decided without waiting for a device."""

    temperatures: Sequence[float]
    """0 is greedy"""
    top_ks: Sequence[int]
    """below 1 is off"""
    top_ps: Sequence[float]
    """1 or more is off"""
    uniforms: Sequence[float] | npt.NDArray[np.float64]
    """in [0, 1), see philox.py"""


def sample_tokens(logits_BV: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Draw one token a row; see Draw."""
    return Draw(rows, logits_BV.shape[1], logits_BV.device)(logits_BV)


class Draw:
    """One draw, prepared on the device before there are logits.

    A copy to a CUDA device waits for what was launched before it. Prepared before the model's pass, only operations
    follow on it, and the host waits once, for the tokens. Rows with top-k or top-p wait twice more.
    """

    def __init__(self, rows: SamplingRows, vocab_size: int, device: torch.device) -> None:
        greedy = [row for row, temperature in enumerate(rows.temperatures) if temperature <= 0]
        truncated = [
            row
            for row, temperature in enumerate(rows.temperatures)
            if temperature > 0 and (0 < rows.top_ks[row] < vocab_size or rows.top_ps[row] < 1)
        ]
        temperatures = [temperature if temperature > 0 else 1.0 for temperature in rows.temperatures]
        self._temperatures_B1 = None
        if any(temperature != 1 for temperature in temperatures):
            self._temperatures_B1 = torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]
        self._uniform_B = torch.as_tensor(rows.uniforms, dtype=torch.float64, device=device)
        self._greedy = torch.tensor(greedy, device=device) if greedy else None
        self._truncated = None
        if truncated:
            top_ks = [rows.top_ks[row] for row in truncated]
            self._truncated = torch.tensor(truncated, device=device)
            self._top_k = torch.tensor(top_ks, device=device)
            self._top_p = torch.tensor([rows.top_ps[row] for row in truncated], dtype=torch.float64, device=device)
            largest = max((top_k for top_k in top_ks if 0 < top_k < vocab_size), default=0)
            self._num_candidates = min(vocab_size, max(_FIRST_CANDIDATES, largest))

    @torch.no_grad()
    def __call__(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one token a row.

        Args:
            logits_BV: any floating dtype; computed in float32.
        Returns: tokens int64 [B] (`NOT_FINITE` where a row has no distribution) and logprobs float32 [B], natural log.
        """
        scaled_BV = logits_BV.float()
        if self._temperatures_B1 is not None:
            scaled_BV = scaled_BV / self._temperatures_B1
        largest_B = scaled_BV.amax(1)
        mass_BV = (scaled_BV - largest_B[:, None]).exp_()  # unnormalised probabilities, the largest is 1
        chunk_mass_BC = _chunked(mass_BV).sum(-1).double()
        total_B = chunk_mass_BC.sum(-1)

        tokens_B = _draw_from_all(mass_BV, chunk_mass_BC, self._uniform_B)
        if (some := self._greedy) is not None:
            tokens_B[some] = scaled_BV[some].argmax(1)  # the first among equals, as torch.argmax documents
        if (some := self._truncated) is not None:
            tokens_B[some] = _draw_truncated(
                mass_BV[some],
                total_B[some],
                self._top_k,
                self._top_p,
                self._uniform_B[some],
                num_candidates=self._num_candidates,
            )
        logprobs_B = scaled_BV.gather(1, tokens_B[:, None])[:, 0] - largest_B - total_B.log().float()
        tokens_B = torch.where(total_B.isfinite() & largest_B.isfinite(), tokens_B, NOT_FINITE)
        return tokens_B, logprobs_B


@torch.no_grad()
def top_logprobs(logits_BV: Tensor, temperatures: Sequence[float], k: int) -> TokenLogprobs:
    """The k most probable tokens of each row, [B, k], the lower id first among equals.

    Logprobs are of the distribution that `sample_tokens` reports: scaled by the temperature, which counts as 1 where
    it is 0.
    """
    scaled_BV = logits_BV.float()
    if any(temperature not in (0, 1) for temperature in temperatures):
        divisor = [temperature if temperature > 0 else 1.0 for temperature in temperatures]
        scaled_BV = scaled_BV / torch.tensor(divisor, dtype=torch.float32, device=logits_BV.device)[:, None]
    logprobs_BV = torch.log_softmax(scaled_BV, dim=1)
    logprobs_BK, token_BK = _highest(logprobs_BV, k)
    return TokenLogprobs(token_BK.int().cpu().numpy(), logprobs_BK.cpu().numpy())


def _chunked(mass_BV: Tensor) -> Tensor:
    """[B, V] as [B, C, W], padded with zeros."""
    padding = -mass_BV.shape[1] % _CHUNK_WIDTH
    if padding:
        mass_BV = torch.nn.functional.pad(mass_BV, (0, padding))
    return mass_BV.view(mass_BV.shape[0], -1, _CHUNK_WIDTH)


def _draw_from_all(mass_BV: Tensor, chunk_mass_BC: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulative distribution in order of token id: first the chunk, then the token inside it.

    Two levels, since a float64 running sum over a whole vocabulary costs more than all the rest.
    """
    until_BC = chunk_mass_BC.cumsum(1)
    target_B = uniform_B * until_BC[:, -1]
    chunk_B = _first_above(until_BC, chunk_mass_BC, target_B)
    rest_B = target_B - (until_BC - chunk_mass_BC).gather(1, chunk_B[:, None])[:, 0]
    inside_BW = _chunked(mass_BV)[torch.arange(len(chunk_B), device=mass_BV.device), chunk_B].double()
    return chunk_B * _CHUNK_WIDTH + _first_above(inside_BW.cumsum(1), inside_BW, rest_B)


def _draw_truncated(
    mass_BV: Tensor, total_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, uniform_B: Tensor, *, num_candidates: int
) -> Tensor:
    """Inverse of the cumulative distribution over what top-k and then top-p leave, most probable first.

    top-p keeps the smallest number of candidates whose share of the mass *left by top-k* reaches top_p, at least one.

    num_candidates: how many to sort at first, no fewer than any row's top-k.
    """
    vocabulary_size = mass_BV.shape[1]
    no_top_k_B = (top_k_B < 1) | (top_k_B >= vocabulary_size)
    limit_B = torch.where(no_top_k_B, vocabulary_size, top_k_B)
    while True:
        mass_BK, token_BK = _highest(mass_BV, num_candidates, worthless=0.0)  # without mass: never drawn
        allowed_BK = torch.arange(num_candidates, device=mass_BV.device) < limit_B[:, None]
        mass_BK = mass_BK.double() * allowed_BK
        until_BK = mass_BK.cumsum(1)
        left_by_top_k_B = torch.where(no_top_k_B, total_B, until_BK[:, -1])
        wanted_B = top_p_B * left_by_top_k_B
        if num_candidates == vocabulary_size or bool((~no_top_k_B | (until_BK[:, -1] >= wanted_B)).all()):
            break
        num_candidates = vocabulary_size
    kept_BK = (until_BK - mass_BK < wanted_B[:, None]) | (top_p_B >= 1)[:, None]
    kept_BK[:, 0] = True
    mass_BK = mass_BK * kept_BK
    until_BK = mass_BK.cumsum(1)
    pick_B = _first_above(until_BK, mass_BK, uniform_B * until_BK[:, -1])
    return token_BK.gather(1, pick_B[:, None])[:, 0]


def _highest(score_BV: Tensor, num_candidates: int, *, worthless: float | None = None) -> tuple[Tensor, Tensor]:
    """Score and token id of the highest candidates in descending order, the lower id first among equals.

    worthless: a score no higher than this makes a token no candidate; which of them fill up the last places is left
        open, as finding the lowest ids among them may cost a sort of the whole vocabulary.
    """
    if num_candidates < score_BV.shape[1]:
        score_BK, token_BK = score_BV.topk(num_candidates, dim=1, sorted=False)
        least_B1 = score_BK.amin(1, keepdim=True)
        # torch.topk takes any of the entries equal to its last one; where that is a choice, sort everything.
        choice_B1 = (score_BV >= least_B1).sum(1, keepdim=True) > num_candidates
        if worthless is not None:
            choice_B1 &= least_B1 > worthless
        if not bool(choice_B1.any()):
            token_BK = token_BK.sort(dim=1).values
            score_BK, order_BK = score_BV.gather(1, token_BK).sort(dim=1, descending=True, stable=True)
            return score_BK, token_BK.gather(1, order_BK)
    score_BV, token_BV = score_BV.sort(dim=1, descending=True, stable=True)
    return score_BV[:, :num_candidates], token_BV[:, :num_candidates]


def _first_above(until_BN: Tensor, mass_BN: Tensor, target_B: Tensor) -> Tensor:
    """Index of the first entry whose running sum exceeds the target; never an entry without mass."""
    index_B = (until_BN <= target_B[:, None]).sum(1)
    last_B = until_BN.shape[1] - 1 - (mass_BN > 0).flip(1).int().argmax(1)  # rounding may push the target past the end
    return torch.minimum(index_B, last_B)
