"""Batches in two disjoint parts: what changes are fitted to, and what the guard looks at."""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.passes.errors import InputError
from graphopt.passes.structure import flatten

Batch = dict[str, Any]

_SHARE = 4
_MOST = 16
"""Most batches to hold out: each is run after every change, and they stay in memory."""


@dataclass(frozen=True)
class Split:
    """Batches to fit changes to, and others.

    Attributes:
        fitted: May be iterated several times; None without data.
        held_out: In memory.
        note: What a user should know about the division, if anything.
    """

    fitted: Iterable[Batch] | None
    held_out: tuple[Batch, ...]
    note: str | None = None


def split(batches: Iterable[Batch], *, by_rows: bool = True) -> Split:
    """Hold out the last quarter of the batches: at least one, at most 16.

    One batch alone is divided by rows. A source that gives other batches each time (a shuffling
    loader) is kept in memory, because its next round would mix the two parts.

    Args:
        batches: The batches; iterated once, and for one batch more.
        by_rows: Whether one batch may be divided.

    Raises:
        InputError: if there is no batch.
    """
    last: deque[Batch] = deque(maxlen=_MOST)
    first: Batch | None = None
    count = 0
    for batch in batches:
        first = batch if first is None else first
        last.append(batch)
        count += 1
    if first is None:
        raise InputError("the calibration data holds no batch; pass at least one")
    if count == 1:
        return _divided(first, by_rows)
    held = min(max(count // _SHARE, 1), _MOST)
    if not _is_same(first, next(iter(batches))):
        kept = list(batches)
        return Split(kept[:-held], tuple(kept[-held:]))
    return Split(_First(batches, count - held), tuple(last)[-held:])


class _First(Iterable[Batch]):
    """The first batches of a series."""

    def __init__(self, batches: Iterable[Batch], count: int) -> None:
        self._batches = batches
        self._count = count

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(iter(self._batches), self._count)

    def __length_hint__(self) -> int:
        return min(self._count, operator.length_hint(self._batches, self._count))


def _divided(batch: Batch, by_rows: bool) -> Split:
    """Return the rows of a batch in two parts, or all of them in both."""
    tensors, structure = flatten(batch)
    rows = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)
    if not by_rows or rows < 2:
        return Split(
            [batch], (batch,), "the guard was checked on the calibration data: one batch is all"
        )
    held = max(rows // _SHARE, 1)

    def part(start: int, end: int) -> Batch:
        found: Batch = structure.rebuild(
            [
                tensor[start:end] if tensor.dim() and tensor.shape[0] == rows else tensor
                for tensor in tensors
            ]
        )
        return found

    return Split([part(0, rows - held)], (part(rows - held, rows),))


def _is_same(first: Batch, second: Batch) -> bool:
    a, b = flatten(first)[0], flatten(second)[0]
    return len(a) == len(b) and all(map(torch.equal, a, b))
