"""Rows of several adapters in one layer of experts: each has its own adapter's numbers, and nothing is kept twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_adapters.adapters import LoraPair, LoraWeights
from megatron_adapters.experts import StackedExperts
from megatron_adapters.families import Experts
from megatron_adapters.grouped import Groups

NUM_EXPERTS, HIDDEN, FFN = 3, 24, 40
EXPERTS = Experts(count=NUM_EXPERTS, top_k=1, ffn_size=FFN, normalize_weights=True)


def layer() -> StackedExperts:
    made = StackedExperts(
        layer=0, num_local=NUM_EXPERTS, hidden_size=HIDDEN, experts=EXPERTS, dtype=torch.float32, device=None
    )
    for parameter in made.parameters():
        parameter.data.normal_(0.0, 0.1)
    return made


def adapter(rank: int, paths: tuple[str, ...], *, per_expert: bool = False) -> LoraWeights:
    def trained(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape)).requires_grad_()

    gate, up, down = paths
    shared = NUM_EXPERTS if per_expert else 1
    inner = {p: LoraPair(trained(shared, rank, HIDDEN), trained(NUM_EXPERTS, FFN, rank)) for p in (gate, up)}
    outer = {down: LoraPair(trained(NUM_EXPERTS, rank, FFN), trained(shared, HIDDEN, rank))}
    return LoraWeights(rank, 32.0, ("gate_proj", "up_proj", "down_proj"), inner | outer, per_expert)


def make(seed: int) -> tuple[StackedExperts, list[LoraWeights | None], Tensor, Groups, Tensor]:
    """A layer; a table of adapters, one row of it the base and one without LoRA on experts; rows and their adapters."""
    torch.manual_seed(seed)
    experts = layer()
    without = LoraWeights(4, 32.0, ("q_proj",), {})
    table = [adapter(4, experts.paths), None, adapter(2, experts.paths, per_expert=True), without]
    counts_E = torch.tensor([70, 0, 50])
    x_ND = torch.randn(120, HIDDEN, requires_grad=True)
    return experts, table, x_ND, Groups(counts_E), torch.randint(0, len(table), (120,))


@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_its_own_adapters(seed: int) -> None:
    experts, table, x_ND, groups, numbers_N = make(seed)
    out_ND = experts(x_ND, groups, table, numbers_N)
    factor_ND = torch.randn_like(out_ND)
    trained = [matrix for lora in table if lora for pair in lora.pairs.values() for matrix in pair]
    found = torch.autograd.grad((out_ND * factor_ND).sum(), [x_ND, *trained])
    expected_ND, total = torch.empty_like(out_ND), x_ND.new_zeros(())
    expert_N = groups.expert_of_row(len(x_ND))
    for number, lora in enumerate(table):
        mine = numbers_N == number
        counts_E = torch.bincount(expert_N[mine], minlength=NUM_EXPERTS)
        alone_ND = experts(x_ND[mine], Groups(counts_E), [lora], None)
        expected_ND[mine] = alone_ND.detach()
        total = total + (alone_ND * factor_ND[mine]).sum()
    assert torch.equal(out_ND, expected_ND)
    for ours, theirs in zip(found, torch.autograd.grad(total, [x_ND, *trained]), strict=True):
        assert float((ours - theirs).abs().max()) <= 4e-7 * float(theirs.abs().max())


def test_mixed_rows_keep_no_more_than_one_adapters() -> None:
    """For the backward, beside the index of the rows."""
    experts, table, x_ND, groups, numbers_N = make(0)

    def kept(*arguments: object) -> int:
        found: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            experts(x_ND, groups, *arguments).sum()
        known = {x.untyped_storage().data_ptr() for x in experts.parameters()}
        return sum(x.untyped_storage().nbytes() for address, x in found.items() if address not in known)

    everyone = [table[0], table[2]]
    alone, mixed = kept([table[0]], None), kept(everyone, numbers_N % 2)
    assert mixed <= 1.1 * alone, (mixed, alone)
