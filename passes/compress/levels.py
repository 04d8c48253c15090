"""What is said of the levels of a change that do not pay."""

from __future__ import annotations

from collections.abc import Sequence


def slower(refused: Sequence[tuple[str, float]]) -> str:
    """Say which levels did not measure faster, and how slow they were.

    Args:
        refused: Levels in words with the times of dense over theirs, at least one.
    """
    ratios = [ratio for _, ratio in refused]
    first, last = refused[0][0], refused[-1][0]
    if len(refused) == 1:
        return f"{first} measured {ratios[0]:.2f}x, not offered"
    return f"{first} to {last} measured {min(ratios):.2f}x to {max(ratios):.2f}x, not offered"
