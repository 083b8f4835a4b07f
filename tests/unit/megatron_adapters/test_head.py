"""The fused head against closed forms in float64: values, gradients, chunks, adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_adapters import head as head_module
from megatron_adapters.adapters import LoraPair, LoraWeights
from megatron_adapters.head import LmHead
from megatron_adapters.lora_linear import Segment

NUM_TOKENS, HIDDEN, VOCAB = 11, 6, 17


class OneRank:
    """A tensor-parallel group of one: nothing to communicate."""

    def size(self) -> int:
        return 1


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def adapter(rank: int, seed: int) -> LoraWeights:
    pair = LoraPair(
        random(rank, HIDDEN, seed=seed).requires_grad_(), random(VOCAB, rank, seed=seed + 1).requires_grad_()
    )
    return LoraWeights(rank=rank, alpha=32.0, targets=("lm_head",), pairs={"lm_head": pair})


@pytest.fixture(params=[1, 40, 10**6], ids=["a token a chunk", "two tokens a chunk", "one chunk"])
def chunk_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", request.param)
    return request.param


@pytest.fixture
def case() -> dict[str, Any]:
    group: Any = OneRank()
    first, second = adapter(3, seed=10), adapter(2, seed=20)
    return {
        "head": LmHead(random(VOCAB, HIDDEN, seed=1), 0, VOCAB, group),
        "hidden": random(NUM_TOKENS, HIDDEN, seed=2).requires_grad_(),
        "targets": torch.randint(0, VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(3)),
        "upstream": random(NUM_TOKENS, seed=4),
        "segments": [Segment(first, 0, 4), Segment(None, 4, 6), Segment(second, 6, 9), Segment(first, 9, NUM_TOKENS)],
        "loras": (first, second),
    }


def full_logits(case: dict[str, Any]) -> Tensor:
    """The same logits written down plainly, differentiable."""
    rows = []
    for lora, start, end in case["segments"]:
        logits = case["hidden"][start:end] @ case["head"].weight_VD.t()
        if lora is not None:
            a, b = lora.pairs["lm_head"]
            logits = logits + lora.scaling * (case["hidden"][start:end] @ a.t() @ b.t())
        rows.append(logits)
    return torch.cat(rows)


def leaves(case: dict[str, Any]) -> list[Tensor]:
    return [case["hidden"], *(x for lora in case["loras"] for x in lora.pairs["lm_head"])]


@pytest.mark.usefixtures("chunk_elements")
def test_logprobs_and_gradients_equal_the_closed_form(case: dict[str, Any]) -> None:
    """d log p(t) / d logits = onehot(t) - softmax; the rest is the chain rule, done here by hand."""
    logprobs = case["head"].target_logprobs(case["hidden"], case["targets"], case["segments"])
    logits = full_logits(case).detach()
    rows = torch.arange(NUM_TOKENS)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[rows, case["targets"]], rtol=0, atol=1e-13)

    logprobs.backward(case["upstream"])
    onehot = torch.zeros_like(logits)
    onehot[rows, case["targets"]] = 1.0
    logit_grad = case["upstream"][:, None] * (onehot - logits.softmax(-1))
    hidden_grad = logit_grad @ case["head"].weight_VD
    expected = {id(x): torch.zeros_like(x) for x in leaves(case)}
    for lora, start, end in case["segments"]:
        if lora is None:
            continue
        a, b = (x.detach() for x in lora.pairs["lm_head"])
        h, g = case["hidden"].detach()[start:end], logit_grad[start:end]
        hidden_grad[start:end] += lora.scaling * g @ b @ a
        expected[id(lora.pairs["lm_head"].a)] += lora.scaling * (g @ b).t() @ h
        expected[id(lora.pairs["lm_head"].b)] += lora.scaling * g.t() @ (h @ a.t())
    expected[id(case["hidden"])] = hidden_grad
    for leaf in leaves(case):
        torch.testing.assert_close(leaf.grad, expected[id(leaf)], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("chunk_elements")
def test_gradients_equal_autograd_through_plain_logits(case: dict[str, Any]) -> None:
    rows = torch.arange(NUM_TOKENS)
    plain = full_logits(case).log_softmax(-1)[rows, case["targets"]]
    theirs = torch.autograd.grad(plain, leaves(case), case["upstream"])
    fused = case["head"].target_logprobs(case["hidden"], case["targets"], case["segments"])
    for times in (1, 2):  # the second time it is added to the first
        fused.backward(case["upstream"], retain_graph=True)
        for leaf, expected in zip(leaves(case), theirs, strict=True):
            torch.testing.assert_close(leaf.grad, times * expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("chunk_elements")
def test_several_targets_a_token_equal_autograd_through_plain_logits(case: dict[str, Any]) -> None:
    """K targets share one softmax; token 3 has the same target twice, as padded rows do."""
    targets = torch.randint(0, VOCAB, (NUM_TOKENS, 4), generator=torch.Generator().manual_seed(5))
    targets[3] = 0
    upstream = random(NUM_TOKENS, 4, seed=6)
    plain = full_logits(case).log_softmax(-1).gather(1, targets)
    theirs = torch.autograd.grad(plain, leaves(case), upstream)
    fused = case["head"].target_logprobs(case["hidden"], targets, case["segments"])
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-13)
    fused.backward(upstream)
    for leaf, expected in zip(leaves(case), theirs, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-12)


def test_logits_of_rows_are_the_full_vocabulary(case: dict[str, Any]) -> None:
    logits = case["head"].logits(case["hidden"].detach(), case["segments"])
    torch.testing.assert_close(logits, full_logits(case).detach(), rtol=0, atol=1e-13)
    assert case["head"].logits(case["hidden"][:0], []).shape == (0, VOCAB)


def test_zero_upstream_gives_exactly_zero_gradients(case: dict[str, Any]) -> None:
    case["head"].target_logprobs(case["hidden"], case["targets"], case["segments"]).backward(torch.zeros(NUM_TOKENS))
    assert all(not leaf.grad.any() for leaf in leaves(case) if leaf.grad is not None)
    assert case["hidden"].grad is not None


def test_large_logits_do_not_overflow(case: dict[str, Any]) -> None:
    logprobs = case["head"].target_logprobs(case["hidden"].detach() * 1e4, case["targets"], case["segments"])
    assert torch.isfinite(logprobs).all()


def test_the_frozen_weight_gets_no_gradient(case: dict[str, Any]) -> None:
    weight = case["head"].weight_VD.requires_grad_()
    case["head"].target_logprobs(case["hidden"], case["targets"], case["segments"]).sum().backward()
    assert weight.grad is None


def test_segments_that_leave_a_gap_are_our_bug(case: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="gap at token 4"):
        case["head"].target_logprobs(case["hidden"], case["targets"], [Segment(None, 0, 4), Segment(None, 5, 11)])
