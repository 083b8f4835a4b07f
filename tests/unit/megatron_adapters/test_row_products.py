"""Few rows and single columns are computed as parts of larger products: the same numbers, and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_adapters.row_products import add_outer_, add_product_, linear, linear_grad, linear_without_graph


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_equal_to_the_plain_products(rows: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, a, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, 5), (rank, 5), (rows, rank))
    )
    torch.testing.assert_close(linear_without_graph(x, a), F.linear(x, a))
    torch.testing.assert_close(linear_grad(x, a), x @ a.t())
    torch.testing.assert_close(linear_grad(x, a.t().contiguous().t()), x @ a.t())
    sums = x.clone()
    add_product_(sums, grad, a, 0.5)
    torch.testing.assert_close(sums, x + 0.5 * grad @ a)
    outer = a.clone()
    add_outer_(outer, grad, x, 0.5)
    torch.testing.assert_close(outer, a + 0.5 * grad.t() @ x)
    outer = a.t().clone()
    add_outer_(outer, x, grad, 0.5)
    torch.testing.assert_close(outer, a.t() + 0.5 * x.t() @ grad)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 4, 1), (3, 1, 4), (1, 1, 1), (20, 4, 3)])
def test_gradients_by_finite_differences(rows: int, inputs: int, outputs: int) -> None:
    x = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, inputs, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert torch.autograd.gradcheck(linear, (x, weight))
