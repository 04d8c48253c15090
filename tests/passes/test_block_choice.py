"""Kept blocks: what is chosen, what the refit makes of it, errors that come true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.passes.block_choice import (
    SparseFit,
    block_energy,
    kept_as_they_are,
    magnitude_layout,
    obs_layout,
    repaired,
)
from graphopt.passes.gram import GramAccumulator

ROWS, INPUTS, OUTPUTS = 200, 12, 8


def problem() -> tuple[Tensor, GramAccumulator, Tensor, Tensor]:
    """Return correlated inputs with a mean, their statistics, a weight and a bias, float64."""
    torch.manual_seed(0)
    mixing = torch.randn(INPUTS, INPUTS, dtype=torch.float64)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64) @ mixing + 2
    statistics = GramAccumulator(INPUTS)
    statistics.update(x)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    return x, statistics, weight, torch.randn(OUTPUTS, dtype=torch.float64)


def error_of(fit: SparseFit, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    assert fit.bias is not None
    expected = x @ weight.T + bias
    actual = x @ fit.layout.unpack(fit.values).T + fit.bias
    return float((actual - expected).norm() / (expected - expected.mean(0)).norm())


def test_magnitude_keeps_the_largest_blocks_of_every_row_tile() -> None:
    _, _, weight, _ = problem()
    weight[4:] *= 100
    layout = magnitude_layout(weight, 4, 3, 2)
    norms = torch.stack([part.norm() for row in weight.split(4) for part in row.split(3, 1)])
    torch.testing.assert_close(block_energy(weight, 4, 3), norms.square().view(2, 4))
    assert torch.equal(layout.mask(), norms.view(2, 4) >= norms.view(2, 4).topk(2).values[:, -1:])


@pytest.mark.parametrize("repair", [True, False])
def test_predicted_errors_come_true(repair: bool) -> None:
    x, statistics, weight, bias = problem()
    layout = magnitude_layout(weight, 4, 3, 2)
    fit = (
        repaired(weight, bias, layout, statistics, 0.1)
        if repair
        else kept_as_they_are(weight, bias, layout, statistics)
    )
    assert fit.relative_error == pytest.approx(error_of(fit, x, weight, bias), rel=1e-9)


def test_without_ridge_the_refit_is_least_squares_on_the_kept_columns() -> None:
    x, statistics, weight, bias = problem()
    layout = magnitude_layout(weight, 4, 3, 2)
    fit = repaired(weight, bias, layout, statistics, 1e-12)
    mask = layout.unpack(torch.ones_like(fit.values))
    for output in range(OUTPUTS):
        columns = mask[output].nonzero().squeeze(1)
        design = torch.cat([x[:, columns], torch.ones(ROWS, 1, dtype=x.dtype)], dim=1)
        target = (x @ weight[output] + bias[output])[:, None]
        solution = torch.linalg.lstsq(design, target).solution.squeeze(1)
        torch.testing.assert_close(layout.unpack(fit.values)[output, columns], solution[:-1])
        assert fit.bias is not None
        torch.testing.assert_close(fit.bias[output], solution[-1])


def test_obs_keeps_one_of_two_groups_that_say_the_same() -> None:
    x, _, weight, bias = problem()
    x[:, 3:6] = x[:, :3] + 0.01 * x[:, 3:6]
    weight[:, :6] *= 3
    statistics = GramAccumulator(INPUTS)
    statistics.update(x)
    obs = obs_layout(weight, statistics.covariance, 4, 3, 2)
    magnitude = magnitude_layout(weight, 4, 3, 2)
    assert magnitude.mask()[:, :2].all()
    assert (obs.mask()[:, :2].sum(1) == 1).all()
    errors = [
        error_of(repaired(weight, bias, layout, statistics, 1e-6), x, weight, bias)
        for layout in (obs, magnitude)
    ]
    assert errors[0] < errors[1]


def test_obs_counts_errors_by_what_they_cost() -> None:
    _, statistics, weight, _ = problem()
    metric = torch.zeros(OUTPUTS, OUTPUTS, dtype=torch.float64)
    metric[5, 5] = 1.0
    weighed = obs_layout(weight, statistics.covariance, 8, 3, 1, metric)
    alone = obs_layout(weight[5:6], statistics.covariance, 1, 3, 1)
    assert weighed.columns.tolist() == alone.columns.tolist()
    assert weighed.is_balanced
