"""Streamed statistics against the same numbers computed at once in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.passes.gram import GramAccumulator


def rows(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * 3 + 5


def assert_same(actual: Tensor, expected: Tensor, count: int, scale: float) -> None:
    """Float64 sums of `count` products of size `scale` in two orders."""
    bound = count * torch.finfo(torch.float64).eps * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def test_statistics_equal_those_of_all_rows_at_once() -> None:
    x, y = rows(60, 7, 0), rows(60, 3, 1)
    gram = GramAccumulator(7, 3)
    gram.update(x[:24].view(2, 12, 7), y[:24].view(2, 12, 3))
    gram.update(x[24:], y[24:])
    assert gram.count == 60
    joint = torch.cat([x, y], dim=1).double()
    covariance = torch.cov(joint.T, correction=0)
    scale = joint.abs().max().item() ** 2
    assert_same(gram.mean_x, joint[:, :7].mean(0), 60, scale)
    assert_same(gram.mean_y, joint[:, 7:].mean(0), 60, scale)
    assert_same(gram.covariance, covariance[:7, :7], 60, scale)
    assert_same(gram.cross_covariance, covariance[:7, 7:], 60, scale)
    assert_same(gram.variance_y, covariance[7:, 7:].diagonal(), 60, scale)


def test_products_are_formed_in_float64() -> None:
    x = torch.tensor([[1e4], [1e4 + 1]])  # float32 squares differ by less than their spacing
    gram = GramAccumulator(1)
    gram.update(x)
    assert gram.covariance.item() == 0.25


def test_channels_that_do_not_vary_have_no_variance() -> None:
    """Else the difference of second moments leaves noise, which may be negative."""
    x = torch.full((100, 8), 0.3) + 1e-8 * rows(100, 8, 0)
    x[:, 5:] = rows(100, 3, 1)
    gram = GramAccumulator(8)
    gram.update(x)
    assert bool((gram.covariance[:5] == 0).all())
    assert bool((gram.covariance[:, :5] == 0).all())
    joint = torch.cov(x.double().T, correction=0)
    assert_same(gram.covariance[5:, 5:], joint[5:, 5:], 100, x.abs().max().item() ** 2)
    torch.linalg.cholesky(gram.covariance + 1e-12 * torch.eye(8, dtype=torch.float64))


def test_masked_rows_do_not_count() -> None:
    x, y = rows(12, 4, 2).view(3, 4, 4), rows(12, 2, 3).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    x[mask == 0] = float("nan")
    masked, plain = GramAccumulator(4, 2), GramAccumulator(4, 2)
    masked.update(x, y, mask)
    plain.update(x[mask == 1], y[mask == 1])
    assert masked.count == 6
    for name, value in plain.state_dict().items():
        assert torch.equal(masked.state_dict()[name], value), name


def test_a_weight_of_two_is_a_row_seen_twice() -> None:
    x, y = rows(9, 4, 6), rows(9, 2, 7)
    weights = torch.arange(9) % 3
    weighted, repeated = GramAccumulator(4, 2), GramAccumulator(4, 2)
    weighted.update(x, y, weights)
    repeated.update(x.repeat_interleave(weights, 0), y.repeat_interleave(weights, 0))
    scale = max(x.abs().max().item(), y.abs().max().item()) ** 2
    for name in ("mean_x", "mean_y", "covariance", "cross_covariance", "variance_y"):
        assert_same(getattr(weighted, name), getattr(repeated, name), 9, scale)


def test_resuming_from_a_saved_state_changes_nothing() -> None:
    x = rows(40, 5, 4)
    whole, first, second = (GramAccumulator(5) for _ in range(3))
    whole.update(x[:20])
    whole.update(x[20:])
    first.update(x[:20])
    saved = first.state_dict()
    first.update(x[20:])  # a saved state is a copy
    second.load_state_dict(saved)
    second.update(x[20:])
    assert second.count == 40
    for resumed in (first, second):
        assert torch.equal(whole.covariance, resumed.covariance)


def test_a_state_of_another_layer_is_refused_and_changes_nothing() -> None:
    gram = GramAccumulator(5)
    gram.update(rows(8, 5, 5))
    before = gram.covariance
    with pytest.raises(ValueError, match=r"expected sum_x \[5\], got \[4\]"):
        gram.load_state_dict(GramAccumulator(4).state_dict())
    with pytest.raises(ValueError, match=r"got nothing"):
        gram.load_state_dict({})
    assert torch.equal(gram.covariance, before)


@pytest.mark.parametrize(
    ("x", "y", "weights", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 2), None, r"inputs \[..., 3\], got \[2, 4\]"),
        (torch.ones(2, 3), None, None, r"targets \[2, 2\], got none"),
        (torch.ones(2, 3), torch.ones(3, 2), None, r"targets \[2, 2\], got \[3, 2\]"),
        (torch.ones(2, 3), torch.ones(2, 2), torch.ones(3), r"row weights \[2\], got \[3\]"),
        (torch.full((2, 3), torch.inf), torch.ones(2, 2), None, "not finite"),
        (torch.ones(2, 3), torch.full((2, 2), torch.nan), None, "not finite"),
        (torch.ones(2, 3), torch.ones(2, 2), torch.tensor([1, torch.inf]), "not finite"),
        (torch.ones(2, 3), torch.ones(2, 2), torch.tensor([1, -1]), ">= 0"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(
    x: Tensor, y: Tensor | None, weights: Tensor | None, message: str
) -> None:
    gram = GramAccumulator(3, 2)
    with pytest.raises(ValueError, match=message):
        gram.update(x, y, weights)
    assert gram.count == 0
    assert all(not value.any() for value in gram.state_dict().values())


def test_uncentered_statistics_are_plain_second_moments() -> None:
    x, y = rows(9, 4, 8), rows(9, 2, 9)
    gram = GramAccumulator(4, 2)
    gram.update(x, y)
    plain = gram.uncentered()
    scale = max(x.abs().max().item(), y.abs().max().item()) ** 2
    assert_same(plain.covariance, x.double().T @ x.double() / 9, 9, scale)
    assert_same(plain.cross_covariance, x.double().T @ y.double() / 9, 9, scale)
    assert gram.mean_x.any()  # the original is unchanged


def test_no_rows_no_statistics() -> None:
    with pytest.raises(ValueError, match="no calibration rows"):
        _ = GramAccumulator(3).covariance
