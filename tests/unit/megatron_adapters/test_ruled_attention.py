"""Windows and sinks against the softmax written out in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_adapters import ruled_attention
from megatron_adapters.ruled_attention import Rule, ruled_decode

BOUNDS = (0, 9, 10, 33)  # sequences of 9, 1 and 23 tokens
H, G, K = 4, 2, 8
RULES = [
    Rule(sinks_H=torch.tensor([0.5, -1.0, 3.0, 0.0])),
    Rule(window=5),
    Rule(scale=0.2, window=3, sinks_H=torch.tensor([0.5, -1.0, 3.0, 0.0])),
]


def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(BOUNDS[-1], H, K), (BOUNDS[-1], G, K), (BOUNDS[-1], G, K)]
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


def written_out(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, rule: Rule) -> Tensor:
    """One query and one head at a time."""
    out = []
    for start, end in pairwise(BOUNDS):
        for t in range(start, end):
            first = start if rule.window is None else max(start, t - rule.window + 1)
            heads = []
            for h in range(H):
                keys, values = k_TGK[first : t + 1, h * G // H], v_TGK[first : t + 1, h * G // H]
                scores = keys @ q_THK[t, h] * (K**-0.5 if rule.scale is None else rule.scale)
                if rule.sinks_H is not None:
                    scores = torch.cat((scores, rule.sinks_H[h : h + 1].to(scores.dtype)))
                heads.append(scores.softmax(0)[: len(values)] @ values)
            out.append(torch.stack(heads))
    return torch.stack(out)


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("rule", RULES, ids=["sinks", "window", "all"])
def test_values_and_gradients(rule: Rule, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruled_attention, "_CHUNK", chunk)
    ours, theirs = tensors(torch.float32), tensors(torch.float64)
    out, expected = ruled_attention.ruled_attention(*ours, BOUNDS, rule), written_out(*theirs, rule)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, atol=5e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=["sinks", "window", "all"])
def test_a_decode_step_is_the_last_row(rule: Rule) -> None:
    q_THK, k_TGK, v_TGK = (x.detach() for x in tensors(torch.float32))
    expected = written_out(q_THK, k_TGK, v_TGK, rule)
    ends = [BOUNDS[1], BOUNDS[3]]
    starts = [BOUNDS[0], BOUNDS[2]]
    keys, values, mask = torch.zeros(2, G, 32, K), torch.zeros(2, G, 32, K), torch.full((2, 32), float("-inf"))
    for lane, (start, end) in enumerate(zip(starts, ends, strict=True)):
        keys[lane, :, : end - start] = k_TGK[start:end].transpose(0, 1)
        values[lane, :, : end - start] = v_TGK[start:end].transpose(0, 1)
        mask[lane, : end - start] = 0
    last = [end - 1 for end in ends]
    positions = torch.tensor([end - start - 1 for start, end in zip(starts, ends, strict=True)])
    query = q_THK[last].view(2, G, H // G, K)
    out = ruled_decode(query, keys, values, mask_NL=mask, positions_N=positions, rule=rule)
    torch.testing.assert_close(out.reshape(2, H, K), expected[last], atol=2e-6, rtol=0)
