"""Sets of indices as short text: `0-5,7,9-12`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .errors import PlanError

_FORM = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def format_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as text."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def parse_ranges(text: object, size: int) -> list[int]:
    """Return the indices of a text, checked against the size of what they index.

    Raises:
        PlanError: if it is not such a text, not ascending, empty or out of range.
    """
    if not isinstance(text, str) or not _FORM.fullmatch(text) or len(text) > 16 * size:
        raise PlanError(f"expected kept indices such as '0-5,7', got {str(text)[:60]!r}")
    result: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first)
        if stop < start or stop >= size or (result and start <= result[-1]):
            raise PlanError(
                f"the kept indices {part!r} are not ascending and below the size {size}"
            )
        result.extend(range(start, stop + 1))
    return result
