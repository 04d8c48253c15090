"""Batches to train on, again and again, from any place among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from graphopt.errors import InputError
from graphopt.passes.structure import flatten

Batch = Mapping[str, Any]

_MIXED_BYTES = 2**26
"""Batches held at once to mix their order: sources may be sorted by length."""


class TrainingBatches:
    """Batches without end: rounds over a source, with a place that can be saved.

    Args:
        batches: The source, iterated once per round.
        seed: A source that shuffles by torch's generator gives the same rounds for the same seed.

    Attributes:
        rounds: Rounds completed.
        taken: Batches of the present round that were taken.
    """

    def __init__(self, batches: Iterable[Batch], seed: int) -> None:
        self._batches = batches
        self._seed = seed
        self.rounds = 0
        self.taken = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, from the present place on.

        Raises:
            InputError: if the source is empty.
        """
        while True:
            torch.manual_seed(self._seed + self.rounds)
            count = 0
            generator = torch.Generator().manual_seed(self._seed + self.rounds)
            for count, batch in enumerate(_mixed(self._batches, generator), start=1):
                if count > self.taken:
                    self.taken = count
                    yield batch
            if not count:
                raise InputError("the loader holds no batch to train on; pass at least two")
            self.rounds, self.taken = self.rounds + 1, 0


def _mixed(batches: Iterable[Batch], generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches in another order: each time one of those that are held."""
    held: list[Batch] = []
    size_bytes = 0
    for batch in batches:
        held.append(batch)
        size_bytes += _size_bytes(batch)
        while size_bytes > _MIXED_BYTES:
            drawn = held.pop(int(torch.randint(len(held), (), generator=generator)))
            size_bytes -= _size_bytes(drawn)
            yield drawn
    for place in torch.randperm(len(held), generator=generator).tolist():
        yield held[place]


def _size_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in flatten(dict(batch))[0])
