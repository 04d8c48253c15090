"""What is known of a time: how many milliseconds, and whether they were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Source: TypeAlias = Literal["measured", "interpolated", "predicted"]
"""Timed here; between timed sizes; or from operations and bytes at this device's rates."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A time and where it comes from."""

    latency_ms: float
    source: Source = "measured"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A dense part and its candidate, timed in turns.

    Attributes:
        dense_ms: Median time of the dense part.
        candidate_ms: Median time of the candidate; infinity where only the dense part runs.
        ratio: Median over the turns of dense / candidate; above 1 the candidate is faster.
        source: Where the times come from.
        decided: Whether the turns agree on which one is faster: False where the middle half of
            their ratios has 1 inside, as for parts so small that mostly overhead is timed.
    """

    dense_ms: float
    candidate_ms: float
    ratio: float
    source: Source = "measured"
    decided: bool = True

    @property
    def is_slower(self) -> bool:
        """Whether the turns agree that the candidate is no faster."""
        return self.decided and self.ratio <= 1


def predicted(dense_ms: float, candidate_ms: float) -> Comparison:
    """Return a comparison of predicted times."""
    return Comparison(
        dense_ms=dense_ms,
        candidate_ms=candidate_ms,
        ratio=dense_ms / candidate_ms,
        source="predicted",
    )


def weaker(*sources: Source) -> Source:
    """Return the source that promises least: what a sum of such times is worth."""
    order: tuple[Source, ...] = ("measured", "interpolated", "predicted")
    return max(sources, key=order.index, default="measured")
