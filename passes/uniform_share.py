"""One share for all layers: the largest that meets a budget."""

from __future__ import annotations

from collections.abc import Callable

_STEPS = 1024


def largest_share(fits: Callable[[float], bool]) -> float:
    """Return the largest share in (0, 1], to 1/1024, that fits; the smallest if none does.

    Args:
        fits: Whether a share meets the budget; whatever fits, every smaller share must fit too.
    """
    low, high = 1, _STEPS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle / _STEPS) else (low, middle - 1)
    return low / _STEPS
