"""Times of one operation at every size from measurements at a few."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from statistics import fmean

from .latency import Comparison, Source, weaker

_SHARES = (0.125, 0.25, 0.5, 0.75)
_ALIGNMENT = 16


def anchor_sizes(dense: int) -> list[int]:
    """Return sizes below that of the dense part to measure at, smallest first, at most four.

    They are multiples of a power of two, like sizes that are worth having: odd ones take longer.
    """
    step = _ALIGNMENT
    while step > 1 and step * 8 > dense:
        step //= 2
    sizes = {max(step, round(share * dense / step) * step) for share in _SHARES}
    return sorted(size for size in sizes if size < dense)


class LatencyCurve:
    """The time of a candidate over its size: straight lines between measured sizes.

    A larger size does not take less time: where measurements say so, that is noise, and the
    neighbours share their mean (isotonic regression by pooling adjacent violators).
    """

    def __init__(self, compared: Mapping[int, Comparison], dense: int) -> None:
        """Hold what was measured.

        Args:
            compared: The dense part against candidates of some sizes.
            dense: The size at which a candidate takes as long as the dense part.
        """
        sizes = sorted(compared)
        points = [compared[size] for size in sizes]
        self._dense_ms = fmean(point.dense_ms for point in points)
        self._sizes = [*sizes, dense]
        self._shares = [*_increasing([p.candidate_ms / p.dense_ms for p in points]), 1.0]
        self._sources: list[Source] = [*(point.source for point in points), "measured"]
        self._decided = [*(point.decided for point in points), True]

    def __call__(self, size: int) -> Comparison:
        """Return the times at a size; outside the measured sizes those of the nearest one."""
        right = min(bisect_left(self._sizes, size), len(self._sizes) - 1)
        left = right if self._sizes[right] <= size else max(right - 1, 0)
        share, source = self._shares[left], self._sources[left]
        if left != right:
            weight = (size - self._sizes[left]) / (self._sizes[right] - self._sizes[left])
            share += weight * (self._shares[right] - share)
            source = weaker(source, self._sources[right], "interpolated")
        elif self._sizes[left] != size:
            source = weaker(source, "interpolated")
        return Comparison(
            dense_ms=self._dense_ms,
            candidate_ms=self._dense_ms * share,
            ratio=1 / share,
            source=source,
            decided=self._decided[left] and self._decided[right],
        )


def _increasing(values: Sequence[float]) -> list[float]:
    """Return the closest values, in squares, that do not decrease."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [fmean(pool) for pool in pools for _ in pool]
