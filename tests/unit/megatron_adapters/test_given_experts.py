"""Which experts a router takes where some are given, and with which weights."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from megatron_adapters.data_checks import check_data
from megatron_adapters.families import Experts
from megatron_adapters.interface import Datum, ModelInfo
from megatron_adapters.mixed_batch import Item, MicroBatch
from megatron_adapters.moe import Router
from megatron_adapters.routing_replay import Given
from tinker_hpc.errors import RequestError, ShapeError

KINDS = {
    "softmax of all": Experts(count=6, top_k=2, ffn_size=4, normalize_weights=False),
    "softmax": Experts(count=6, top_k=2, ffn_size=4, normalize_weights=True, router_bias=True),
    "sigmoid": Experts(
        count=6, top_k=2, ffn_size=4, normalize_weights=True, sigmoid=True, groups=3, top_groups=1, scaling=2.5
    ),
}
INFO = ModelInfo("any", 9, 99, 2, 8, (), num_experts=6, expert_layers=2, experts_per_token=2)


def router(kind: str) -> Router:
    torch.manual_seed(1)
    made = Router(KINDS[kind], 8, torch.float64, None)
    for parameter in made.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape))
    return made


def weights(made: Router, x_LD: torch.Tensor, chosen_LK: torch.Tensor) -> torch.Tensor:
    """The formulas of the families, of these experts, in float64."""
    logits_LE = x_LD @ made.weight.T + (0 if made.bias is None else made.bias)
    if made.experts.sigmoid:
        scores_LK = logits_LE.sigmoid().gather(1, chosen_LK)
        return 2.5 * scores_LK / scores_LK.sum(1, keepdim=True)
    scores_LK = logits_LE.softmax(1).gather(1, chosen_LK)
    return scores_LK / scores_LK.sum(1, keepdim=True) if made.experts.normalize_weights else scores_LK


@pytest.mark.parametrize("kind", KINDS)
def test_given_experts_have_the_weights_of_the_routers_own_scores(kind: str) -> None:
    """And their gradient; tokens without keep the router's choice."""
    made, x_LD = router(kind), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    own_LK, own_weights_LK = made(x_LD)
    experts_LMK = torch.tensor([[[0, 1], [5, 3]]]).expand(5, 2, 2).to(torch.uint8)
    replayed_L = torch.tensor([True, True, False, True, False])
    chosen_LK, weights_LK = made(x_LD, lambda own: Given(experts_LMK, replayed_L).choose(1, own))
    assert chosen_LK[replayed_L].tolist() == [[5, 3]] * 3
    assert torch.equal(chosen_LK[~replayed_L], own_LK[~replayed_L])
    torch.testing.assert_close(weights_LK[~replayed_L], own_weights_LK[~replayed_L], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weights_LK, weights(made, x_LD, chosen_LK), rtol=1e-6, atol=1e-7)
    factor_LK = torch.randn(weights_LK.shape, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((w * factor_LK).sum(), x_LD)[0] for w in (weights_LK, weights(made, x_LD, chosen_LK))
    )
    assert ours.abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def datum(length: int, first: int | None) -> Datum:
    inputs = {"target_tokens": np.zeros(length, np.int64)}
    if first is None:
        return Datum(np.zeros(length, np.int32), inputs)
    experts = np.arange(first, first + 4 * length, dtype=np.uint8).reshape(length, 2, 2) % 6
    return Datum(np.zeros(length, np.int32), inputs, experts.astype(np.uint8))


def test_a_micro_batch_gives_each_token_its_own() -> None:
    data = [datum(3, 0), datum(2, None), datum(1, 4)]
    given = MicroBatch([], [Item(0, place, one) for place, one in enumerate(data)], 8).given(torch.device("cpu"))
    assert given is not None
    assert given.replayed_T.tolist() == [True, True, True, False, False, True, False, False]
    assert given.experts_TMK[:3].tolist() == data[0].experts.tolist()  # type: ignore[union-attr]
    assert given.share(4, 8).experts_TMK[1].tolist() == [[4, 5], [0, 1]]
    assert MicroBatch([], [Item(0, 0, datum(3, None))], 4).given(torch.device("cpu")) is None


def test_experts_of_another_model_are_refused() -> None:
    with pytest.raises(ShapeError, match=re.escape("[3, 2, 2], expected [3, 4, 2]")):
        check_data([datum(3, 0)], ModelInfo("any", 9, 99, 4, 8, (), 6, expert_layers=4, experts_per_token=2))
    with pytest.raises(RequestError, match="expert 5 of 4"):
        check_data([datum(3, 0)], ModelInfo("any", 9, 99, 2, 8, (), 4, expert_layers=2, experts_per_token=2))
    check_data([datum(3, 0), datum(2, None)], INFO)


def test_experts_for_a_model_without_are_refused() -> None:
    dense = ModelInfo("any", 9, 99, 2, 8, ())
    brought = Datum(np.zeros(3, np.int32), {"target_tokens": np.zeros(3, np.int64)}, np.zeros((3, 0, 0), np.uint8))
    with pytest.raises(ShapeError, match=re.escape("shape [3, 0, 0], and this model has none")):
        check_data([brought], dense)


@pytest.mark.parametrize("key", ["target_tokens", "weights"])
def test_no_entries_at_all_are_refused(key: str) -> None:
    inputs = {"target_tokens": np.zeros(3, np.int64)} | {key: np.zeros((3, 0), np.int64)}
    with pytest.raises(ShapeError, match=re.escape(f"datum 0: {key} has shape [3, 0], the datum has 3 tokens")):
        check_data([Datum(np.zeros(3, np.int32), inputs)], INFO)
