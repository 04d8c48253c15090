"""Closed forms against brute force over explicit rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from graphopt.passes.gram import GramAccumulator
from graphopt.passes.least_squares import (
    channels_of_groups,
    eliminate_groups,
    fit_linear,
    kept_group_count,
    magnitude_scores,
    obs_scores,
    select_groups,
    weigh_outputs,
)
from graphopt.passes.whitening import whiten

ROWS, CHANNELS, OUTPUTS = 200, 8, 5


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return correlated rows x with a mean, a weight and a bias, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(ROWS, CHANNELS) @ draw(CHANNELS, CHANNELS) + 2
    return x, draw(OUTPUTS, CHANNELS), draw(OUTPUTS)


def gram_of(x: Tensor, y: Tensor | None = None) -> GramAccumulator:
    gram = GramAccumulator(x.shape[1], 0 if y is None else y.shape[1])
    gram.update(x, y)
    return gram


def ridge(x: Tensor, y: Tensor, damping: float, prior: Tensor) -> tuple[Tensor, Tensor, float]:
    """Solve min |x W^T + b - y|^2 / rows + lambda |W - prior|^2 with stacked rows.

    Returns weight, bias and the fit's relative error.
    """
    centered = x - x.mean(0)
    strength = (damping * centered.square().mean() * len(x)) ** 0.5
    design = torch.cat([centered, strength * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([y - y.mean(0), strength * prior.T])
    weight = torch.linalg.lstsq(design, target).solution.T
    bias = y.mean(0) - weight @ x.mean(0)
    error = (x @ weight.T + bias - y).square().sum() / (y - y.mean(0)).square().sum()
    return weight, bias, error.item()


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_repair_is_the_ridge_solution_on_the_rows(damping: float) -> None:
    x, weight, bias = problem()
    kept = torch.tensor([0, 3, 4, 7])
    fit = fit_linear(gram_of(x), weight, bias, kept, damping=damping)
    expected = ridge(x[:, kept], x @ weight.T + bias, damping, weight[:, kept])
    assert_close(fit.weight, expected[0])
    assert_close(fit.bias, expected[1])
    assert fit.relative_error == pytest.approx(expected[2], rel=1e-7)


def test_repair_towards_targets_is_the_ridge_solution_on_the_rows() -> None:
    x, weight, bias = problem()
    y = x.roll(1, 0) @ weight.T + torch.sin(x[:, :OUTPUTS])
    kept = torch.tensor([1, 2, 6])
    fit = fit_linear(gram_of(x, y), weight, bias, kept, damping=0.1)
    expected = ridge(x[:, kept], y, 0.1, weight[:, kept])
    assert_close(fit.weight, expected[0])
    assert_close(fit.bias, expected[1])
    assert fit.relative_error == pytest.approx(expected[2], rel=1e-7)


def test_repair_is_exact_where_removed_channels_depend_on_kept_ones() -> None:
    x, weight, bias = problem()
    x[:, 5] = 2 * x[:, 0] - x[:, 1] + 3
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    fit = fit_linear(gram_of(x), weight, bias, kept, damping=1e-12)
    assert_close(x[:, kept] @ fit.weight.T + fit.bias, x @ weight.T + bias)
    assert fit.relative_error < 1e-12


def test_a_layer_that_lost_nothing_stays_as_it_is() -> None:
    x, weight, _ = problem()
    fit = fit_linear(gram_of(x), weight, None)
    assert_close(fit.weight, weight)
    assert_close(fit.bias, torch.zeros(OUTPUTS, dtype=torch.float64))


def test_constant_inputs_move_into_the_bias() -> None:
    _, weight, bias = problem()
    x = torch.full((20, CHANNELS), 3.0, dtype=torch.float64)
    fit = fit_linear(gram_of(x), weight, bias, torch.tensor([2]))
    assert_close(x[:1, [2]] @ fit.weight.T + fit.bias, x[:1] @ weight.T + bias)
    assert fit.relative_error == 0.0


@pytest.mark.parametrize("group_size", [1, 2])
def test_obs_score_is_the_error_after_removing_a_group_and_refitting(group_size: int) -> None:
    x, weight, _ = problem(1)
    damping = 0.05
    scores = obs_scores(gram_of(x).covariance, weight, group_size=group_size, damping=damping)
    centered = x - x.mean(0)
    strength = (damping * centered.square().mean() * ROWS) ** 0.5
    design = torch.cat([centered, strength * torch.eye(CHANNELS, dtype=x.dtype)])
    target = design @ weight.T
    for group, score in enumerate(scores):
        gone = set(range(group * group_size, (group + 1) * group_size))
        left = [c for c in range(CHANNELS) if c not in gone]
        solution = torch.linalg.lstsq(design[:, left], target).solution
        error = (design[:, left] @ solution - target).square().sum() / ROWS
        assert_close(score, error)


def test_weighed_outputs_measure_errors_in_the_metric() -> None:
    _, weight, _ = problem(9)
    gradients = problem(10)[0][:3, :OUTPUTS]  # fewer than outputs: a singular metric
    metric = gradients.T @ gradients
    weighed = weigh_outputs(weight, metric)
    assert_close(weighed.T @ weighed, weight.T @ metric @ weight)


@pytest.mark.parametrize(("group_size", "keep"), [(1, 3), (2, 2)])
def test_elimination_removes_the_group_whose_loss_is_repaired_best(
    group_size: int, keep: int
) -> None:
    x, weight, _ = problem(2)
    design = torch.cat([x - x.mean(0), 1e-4 * torch.eye(CHANNELS, dtype=x.dtype)])
    target = design @ weight.T

    def error(groups: list[int]) -> float:
        left = channels_of_groups(torch.tensor(groups), group_size)
        solution = torch.linalg.lstsq(design[:, left], target).solution
        return float((design[:, left] @ solution - target).square().sum())

    alive = list(range(CHANNELS // group_size))
    while len(alive) > keep:
        gone = min(alive, key=lambda g: error([a for a in alive if a != g]))
        alive.remove(gone)
    kept = eliminate_groups(
        gram_of(x).covariance, weight, keep, group_size=group_size, damping=1e-10
    )
    assert kept.tolist() == alive


def test_elimination_keeps_one_of_two_twins_where_one_shot_scores_drop_both() -> None:
    x, _, _ = problem(3)
    x = x[:, :4] - x[:, :4].mean(0)
    x[:, 1] = x[:, 0]
    weight = torch.diag(torch.tensor([5.0, 5.0, 0.1, 0.1], dtype=torch.float64))
    covariance = gram_of(x).covariance
    assert select_groups(obs_scores(covariance, weight, damping=1e-9), 2).tolist() == [2, 3]
    kept = eliminate_groups(covariance, weight, 2, damping=1e-9).tolist()
    assert len({0, 1} & set(kept)) == 1


def test_elimination_in_steps_removes_as_many() -> None:
    x, weight, _ = problem(4)
    covariance = gram_of(x).covariance
    kept = eliminate_groups(covariance, weight, 3, step=4)
    assert kept.numel() == 3
    one_shot = select_groups(obs_scores(covariance, weight), 3)
    assert eliminate_groups(covariance, weight, 3, step=5).tolist() == one_shot.tolist()


def test_factors_reach_the_best_rank_r_error_and_predict_it() -> None:
    x, weight, bias = problem(5)
    y = x @ weight.T + bias
    for rank in range(1, OUTPUTS + 1):
        factors = whiten(gram_of(x), weight, bias, damping=1e-13).factors(rank)
        found = (x @ factors.down.T) @ factors.up.T + factors.bias
        error = ((found - y).square().sum() / (y - y.mean(0)).square().sum()).item()
        energy = torch.linalg.svdvals(y - y.mean(0)).square()  # Eckart-Young on the outputs
        best = (energy[rank:].sum() / energy.sum()).item()
        assert error == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert factors.relative_error == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert factors.down.shape == (rank, CHANNELS)
        assert factors.up.shape == (OUTPUTS, rank)


def test_magnitude_is_the_product_of_norms_over_the_group() -> None:
    _, weight, _ = problem(6)
    producer = torch.randn(CHANNELS, 3, 3, generator=torch.Generator().manual_seed(7))
    scores = magnitude_scores([weight, producer.movedim(0, -1)], group_size=4)
    for group, channels in enumerate([slice(0, 4), slice(4, 8)]):
        expected = weight[:, channels].norm() * producer[channels].double().norm()
        assert_close(scores[group], expected)


def test_selection_keeps_the_highest_and_the_first_of_equals() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    assert select_groups(scores, 3).tolist() == [0, 1, 3]
    assert channels_of_groups(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize(
    ("groups", "share", "round_to", "kept"),
    [
        (1536, 0.5125, 8, 784),
        (1536, 1.0, 64, 1536),
        (100, 0.29, 1, 29),  # 100 * 0.29 is 28.999...96 in binary
        (12, 0.01, 1, 1),
        (12, 0.01, 8, 8),
        (4, 0.5, 8, 4),
        (20, 1.0, 8, 20),
    ],
)
def test_kept_count(groups: int, share: float, round_to: int, kept: int) -> None:
    assert kept_group_count(groups, share, round_to) == kept


def test_bad_arguments_are_refused() -> None:
    x, weight, bias = problem()
    gram = gram_of(x)
    with pytest.raises(ValueError, match=r"1 <= keep <= 4"):
        eliminate_groups(gram.covariance, weight, 5, group_size=2)
    with pytest.raises(ValueError, match=r"groups that divide 8 channels, got 3"):
        obs_scores(gram.covariance, weight, group_size=3)
    with pytest.raises(ValueError, match=r"1 <= rank <= 5"):
        whiten(gram, weight, bias).factors(6)
    with pytest.raises(ValueError, match=r"8 channels"):
        fit_linear(gram, weight[:, :4], bias)
    with pytest.raises(ValueError, match="share"):
        kept_group_count(8, 0.0)
