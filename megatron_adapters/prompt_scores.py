"""What a sampling request asks about its prompt: logprobs of its tokens, the likeliest, given ones, and draws.

Everything comes out of the hidden states that the prefill computed anyway. The plain logprobs use the fused head; the
others need whole distributions, which exist for a chunk of positions at a time.

Row r of a distribution is about prompt token r + 1, which the hidden state of token r predicts.

Shapes: P prompt tokens, D hidden size, V vocabulary, K candidates, C positions of a chunk, N cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .adapters import LoraWeights
from .head import CHUNK_ELEMENTS
from .lora_linear import Segment
from .philox import uniform_numbers
from .sample_request import NO_LOGPROB, NO_TOKEN, PromptScores, SampleRequest, TokenLogprobs
from .stage_head import Head
from .token_sampler import SamplingRows, sample_tokens, top_logprobs

ALTERNATIVES_STREAM = 1
"""Of philox.py: these draws have nothing to do with those of the sampled tokens."""


@dataclass(frozen=True)
class Prompt:
    """A computed prompt: hidden_PD its final hidden states, `lora` the weights they were computed with."""

    request: SampleRequest
    hidden_PD: Tensor
    lora: LoraWeights | None


@torch.no_grad()
def score_prompts(head: Head, prompts: Sequence[Prompt | None]) -> list[PromptScores | None]:
    """Answer what each request asks about its prompt; None stays None.

    Collectives: over the TP group those of `LmHead.target_logprobs` once if any prompt wants its own logprobs, and per
        chunk of positions those of `LmHead.logits`.
    """
    own = iter(_own_logprobs(head, [prompt for prompt in prompts if prompt and prompt.request.prompt_logprobs]))
    scores: list[PromptScores | None] = []
    for prompt in prompts:
        if prompt is None:
            scores.append(None)
            continue
        logprobs = next(own) if prompt.request.prompt_logprobs else None
        scores.append(_Distributions(prompt).scored(head, logprobs))
    return scores


def _own_logprobs(head: Head, prompts: Sequence[Prompt]) -> list[npt.NDArray[np.float32]]:
    """log p of each prompt token after those before it: float32 [P], NaN where not asked for."""
    if not prompts:
        return []
    hidden, targets, segments, firsts = [], [], [], []
    position = 0
    for prompt in prompts:
        length = len(prompt.request.prompt) - 1
        first = _first_row(prompt.request)
        hidden.append(prompt.hidden_PD[first:length])
        targets.append(prompt.request.prompt[first + 1 :].astype(np.int64))
        segments.append(Segment(prompt.lora, position, position + length - first))
        firsts.append(first)
        position += length - first
    scored_N = np.empty(0, dtype=np.float32)
    if position:  # prompts of one token have nothing to score; all ranks see the same prompts
        targets_N = torch.from_numpy(np.concatenate(targets)).to(hidden[0].device)
        scored_N = head.target_logprobs(torch.cat(hidden), targets_N, segments).float().cpu().numpy()
    results = []
    for prompt, segment, first in zip(prompts, segments, firsts, strict=True):
        whole = np.full(len(prompt.request.prompt), np.nan, dtype=np.float32)
        whole[first + 1 :] = scored_N[segment.start : segment.end]
        results.append(whole)
    return results


def _first_row(request: SampleRequest) -> int:
    """The first row that `prompt_logprobs_last_n` leaves."""
    last_n = request.prompt_logprobs_last_n
    return 0 if last_n is None else len(request.prompt) - 1 - last_n


class _Distributions:
    """The answers for one prompt that need whole distributions, filled in chunk by chunk."""

    def __init__(self, prompt: Prompt) -> None:
        request, num_rows = prompt.request, len(prompt.request.prompt) - 1
        self.prompt, self.request, self.num_rows = prompt, request, num_rows
        self.topk = self.alternatives = None
        self.targets: npt.NDArray[np.float32] | None = None
        if k := request.topk_prompt_logprobs:
            self.topk = TokenLogprobs(
                np.full((num_rows + 1, k), NO_TOKEN, np.int32), np.full((num_rows + 1, k), NO_LOGPROB, np.float32)
            )
        if k := request.prompt_alt_tokens_k:
            self.alternatives = TokenLogprobs(np.zeros((num_rows, k), np.int32), np.zeros((num_rows, k), np.float32))
        if request.target_prompt_logprobs is not None:
            self.targets = np.zeros(request.target_prompt_logprobs.ids.size, np.float32)

    def scored(self, head: Head, logprobs: npt.NDArray[np.float32] | None) -> PromptScores:
        hidden_PD, lora = self.prompt.hidden_PD, self.prompt.lora
        width = head.vocab_size * max(1, self.request.prompt_alt_tokens_k)
        step = max(1, CHUNK_ELEMENTS // width)
        for start in range(self._first_row(), self.num_rows, step):
            end = min(start + step, self.num_rows)
            logits_CV = head.logits(hidden_PD[start:end], [Segment(lora, 0, end - start)])
            if self.topk is not None:
                self._fill_topk(logits_CV, start)
            if self.targets is not None:
                self._fill_targets(logits_CV, start)
            if self.alternatives is not None:
                self._draw_alternatives(logits_CV, start)
        return PromptScores(logprobs, self.topk, self.targets, self.alternatives)

    def _first_row(self) -> int:
        """Rows before it are asked for by nobody."""
        firsts = [self.num_rows]
        if self.topk is not None:
            firsts.append(_first_row(self.request))
        if self.alternatives is not None:
            firsts.append(0)
        if self.request.target_prompt_logprobs is not None:
            asked = self.request.target_prompt_logprobs
            firsts.append(int(asked.rows[asked.ids >= 0].min(initial=self.num_rows)))
        return min(firsts)

    def _fill_topk(self, logits_CV: Tensor, start: int) -> None:
        assert self.topk is not None
        skipped = max(0, _first_row(self.request) - start)
        rows = slice(start + skipped + 1, start + logits_CV.shape[0] + 1)
        if skipped < logits_CV.shape[0]:
            kept_CV = logits_CV[skipped:]
            top = top_logprobs(kept_CV, [1.0] * kept_CV.shape[0], self.topk.token_ids.shape[1])
            self.topk.token_ids[rows], self.topk.logprobs[rows] = top.token_ids, top.logprobs

    def _fill_targets(self, logits_CV: Tensor, start: int) -> None:
        asked = self.request.target_prompt_logprobs
        assert asked is not None and self.targets is not None
        cells_N = np.flatnonzero((asked.ids >= 0) & (asked.rows >= start) & (asked.rows < start + logits_CV.shape[0]))
        if cells_N.size:
            logprobs_CV = torch.log_softmax(logits_CV.float(), dim=1)
            rows_N = torch.from_numpy(asked.rows[cells_N] - start).to(logits_CV.device)
            ids_N = torch.from_numpy(asked.ids[cells_N]).to(logits_CV.device)
            self.targets[cells_N] = logprobs_CV[rows_N, ids_N].cpu().numpy()

    def _draw_alternatives(self, logits_CV: Tensor, start: int) -> None:
        assert self.alternatives is not None
        count, k = logits_CV.shape[0], self.alternatives.token_ids.shape[1]
        temperature, seed = self.request.temperature, self.request.seed
        places = np.repeat(np.arange(start, start + count), k).tolist()
        draws = np.tile(np.arange(k), count).tolist()
        uniforms = uniform_numbers([seed] * (count * k), draws, places, stream=ALTERNATIVES_STREAM)
        rows = SamplingRows([temperature] * (count * k), [-1] * (count * k), [1.0] * (count * k), uniforms)
        tokens_N, _ = sample_tokens(logits_CV.repeat_interleave(k, dim=0), rows)
        # A row without a distribution has no token: 0, with the NaN that says so.
        tokens_CK = tokens_N.clamp(min=0).view(count, k)
        logprobs_CK = torch.log_softmax(logits_CV.float(), dim=1).gather(1, tokens_CK)
        here = slice(start, start + count)
        self.alternatives.token_ids[here] = tokens_CK.int().cpu().numpy()
        self.alternatives.logprobs[here] = logprobs_CK.cpu().numpy()
