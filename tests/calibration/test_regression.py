"""Sums over tokens, their regression, and the quantile of a histogram, against numpy."""

import numpy
import pytest
import torch
from torch import Tensor

from megatron_dmc.calibration.regression import RIDGE, Sums, solve
from megatron_dmc.calibration.threshold import Histogram, quantile

TOKENS, HIDDEN, TARGETS = 500, 13, 3


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of very different sizes, about means that are not 0, and targets that are nearly linear in them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(TOKENS, HIDDEN, generator=generator) * torch.logspace(-2, 2, HIDDEN) + 1
    weight = torch.randn(HIDDEN, TARGETS, generator=generator) / torch.logspace(-2, 2, HIDDEN)[:, None]
    return features, features @ weight - 7 + 0.1 * torch.randn(TOKENS, TARGETS, generator=generator)


def summed(features: Tensor, targets: Tensor, parts: int, rows: slice = slice(0, HIDDEN)) -> Sums:
    sums = Sums.empty(HIDDEN, TARGETS, rows.stop - rows.start, torch.device("cpu"))
    for pair in zip(features.chunk(parts), targets.chunk(parts), strict=True):
        sums.add(*pair, rows)
    return sums


@pytest.mark.parametrize("parts", [1, 7])
def test_the_solution_is_the_ridge_regression_with_a_free_offset(parts: int) -> None:
    features, targets = draw()
    fit = solve(summed(features, targets, parts), None)
    x, y = features.double().numpy(), targets.double().numpy()
    # Rows that ask every weight to be small, scaled as its feature is; none for the offset.
    penalty = numpy.diag(numpy.sqrt(RIDGE * TOKENS * (x**2).mean(0)))
    rows = numpy.block([[x, numpy.ones((TOKENS, 1))], [penalty, numpy.zeros((HIDDEN, 1))]])
    expected = numpy.linalg.lstsq(rows, numpy.concatenate([y, numpy.zeros((HIDDEN, TARGETS))]), rcond=None)[0]
    numpy.testing.assert_allclose(fit.weight.numpy(), expected[:-1], rtol=1e-6)
    numpy.testing.assert_allclose(fit.offset.numpy(), expected[-1], rtol=1e-6)
    numpy.testing.assert_allclose(fit.mean_square.numpy(), (x**2).mean(0), rtol=1e-5)


def test_a_rank_sums_its_rows_only() -> None:
    features, targets = draw()
    whole = summed(features, targets, 3)
    part = summed(features, targets, 3, slice(5, 9))
    torch.testing.assert_close(part.gram, whole.gram[5:9])
    assert torch.equal(part.products, whole.products)


def test_a_feature_that_is_always_zero_has_no_weight() -> None:
    features, targets = draw()
    features[:, 4] = 0
    fit = solve(summed(features, targets, 1), None)
    assert torch.isfinite(fit.weight).all() and not fit.weight[4].any()


@pytest.mark.parametrize("share", [0.005, 0.3, 0.75, 0.999])
def test_the_quantile_of_a_histogram(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(200_000, generator=generator) - 6
    histogram = Histogram(torch.device("cpu"))
    for part in values.chunk(9):
        histogram.add(part)
    found = quantile(histogram.counts, share)
    assert found == pytest.approx(float(numpy.quantile(values.numpy(), share)), abs=2e-3)
    assert float((values < found).double().mean()) == pytest.approx(share, abs=1e-3)


def test_values_beyond_the_bins_count_at_the_ends() -> None:
    histogram = Histogram(torch.device("cpu"))
    histogram.add(torch.tensor([-1e9, -70.0, 0.5, 70.0, float("inf")]))
    assert int(histogram.counts.sum()) == 5
    assert int(histogram.counts[0]) == 2 and int(histogram.counts[-1]) == 2
