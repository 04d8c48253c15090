"""Values that are too large to keep many of: the one computed last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .program import Program

T = TypeVar("T")


def latest(program: Program, slot: str, key: str, compute: Callable[[], T]) -> T:
    """Return a value, computed unless it was the last one asked for in its slot.

    Args:
        program: What it is about; after a change of its graph nothing is kept.
        slot: Name of the place that holds one value.
        key: Name of the value.
        compute: Computes it; the one in the slot is dropped first.
    """
    held: dict[str, T] = program.fact(f"latest {slot}", lambda _: {})
    if key not in held:
        held.clear()
        held[key] = compute()
    return held[key]
