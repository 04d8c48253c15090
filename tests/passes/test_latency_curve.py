"""Times over sizes: exact at measured ones, straight in between, never falling."""

from __future__ import annotations

import math

import pytest

from graphopt.passes.latency import Comparison, Source
from graphopt.passes.latency_curve import LatencyCurve, anchor_sizes


def curve(shares: dict[int, float], dense: int = 8, source: Source = "measured") -> LatencyCurve:
    return LatencyCurve(
        {
            size: Comparison(
                dense_ms=2.0,
                candidate_ms=2.0 * share,
                ratio=1 / share if share else math.inf,
                source=source,
            )
            for size, share in shares.items()
        },
        dense,
    )


@pytest.mark.parametrize(
    ("dense", "sizes"),
    [
        (1536, [192, 384, 768, 1152]),
        (384, [48, 96, 192, 288]),
        (100, [16, 24, 48, 72]),
        (12, [2, 3, 6, 9]),
        (4, [1, 2, 3]),
        (2, [1]),
        (1, []),
    ],
)
def test_sizes_to_measure_are_few_and_aligned(dense: int, sizes: list[int]) -> None:
    assert anchor_sizes(dense) == sizes


@pytest.mark.parametrize(
    ("size", "share", "source"),
    [
        (2, 0.25, "measured"),
        (4, 0.5, "measured"),
        (3, 0.375, "interpolated"),
        (6, 0.75, "interpolated"),
        (7, 0.875, "interpolated"),
        (8, 1.0, "measured"),
        (1, 0.25, "interpolated"),
    ],
)
def test_times_lie_on_straight_lines_through_what_was_measured(
    size: int, share: float, source: str
) -> None:
    found = curve({4: 0.5, 2: 0.25})(size)
    assert found.dense_ms == 2.0
    assert found.candidate_ms == pytest.approx(2 * share, rel=1e-12)
    assert found.ratio == pytest.approx(1 / share, rel=1e-12)
    assert found.source == source


def test_noise_that_makes_smaller_sizes_slower_is_averaged_out() -> None:
    times = curve({1: 0.1, 2: 0.5, 4: 0.3, 6: 0.9})
    assert times(1).candidate_ms == pytest.approx(0.2)
    assert times(2).candidate_ms == times(4).candidate_ms == pytest.approx(0.8)
    shares = [times(size).candidate_ms for size in range(1, 9)]
    assert shares == sorted(shares)


def test_what_was_predicted_stays_predicted() -> None:
    times = curve({2: 0.25, 4: 0.5}, source="predicted")
    assert times(3).source == times(4).source == times(6).source == "predicted"


def test_a_size_that_does_not_run_is_infinitely_slow() -> None:
    times = curve({2: 0.5, 4: math.inf})
    assert times(2).ratio == 2
    assert times(3).ratio == times(4).ratio == 0
