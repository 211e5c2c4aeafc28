"""The norm of queries and keys against its definition, outputs and gradients."""

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.head_norm import head_norm


def by_definition(x: Tensor, weight: Tensor, epsilon: float, last_channel: float) -> Tensor:
    """One head after the other; the last channel is scaled, and counts as the square of its scale."""
    counts = [1.0] * (x.shape[-1] - 1) + [last_channel**2]
    mean = sum(count * x[..., i] ** 2 for i, count in enumerate(counts)) / sum(counts)
    return weight * x / (mean[..., None] + epsilon).sqrt()


@pytest.mark.parametrize("head_dim", [2, 7, 64])
@pytest.mark.parametrize("last_channel", [1.0, 0.6, 0.0])
def test_it_is_its_definition(head_dim: int, last_channel: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, head_dim, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = (1 + 0.3 * torch.randn(head_dim, generator=generator, dtype=torch.float64)).requires_grad_()
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results = []
    for function in (head_norm, by_definition):
        out = function(x, weight, 1e-5, last_channel)
        results.append([out, *torch.autograd.grad(out, (x, weight), direction)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_channel_that_counts_nothing_changes_no_other() -> None:
    x, weight = torch.randn(3, 8), torch.rand(8)
    other = x.clone()
    other[:, -1] = 1e4
    assert torch.equal(head_norm(x, weight, 1e-6, 0.0)[:, :-1], head_norm(other, weight, 1e-6, 0.0)[:, :-1])
    assert not torch.allclose(head_norm(x, weight, 1e-6)[:, :-1], head_norm(other, weight, 1e-6)[:, :-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 16).to(dtype), torch.rand(16).to(dtype)
    for last_channel in (1.0, 0.0):
        got = head_norm(x, weight, 1e-6, last_channel)
        assert got.dtype == dtype
        expected = by_definition(x.double(), weight.double(), 1e-6, last_channel)
        torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
