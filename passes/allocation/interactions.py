"""What changes save beside each other, predicted: costs of an operation multiply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.passes.base import Cost
from graphopt.passes.budget import Resource, spent

from .dry_run import DryRun
from .offers import Offer
from .selection import owner_of


class Interactions:
    """Predicts the cost of any choice from dry runs of single changes, one for each target.

    An operation costs the product of what each change alone leaves of it: exact for widths that
    are removed on both sides of a product and for formats of fewer bits. Between no change and the
    strongest level that share is linear in what a level saves.
    """

    def __init__(self, offers: Sequence[Offer], dry_run: DryRun, resource: Resource) -> None:
        """Make the dry runs.

        Args:
            offers: What may be chosen.
            dry_run: Makes changes.
            resource: FLOPs, parameters or bytes.
        """
        dense = dry_run.dense
        whole = spent(dense, resource)
        before = _amounts(dry_run.nodes(None), resource)
        names = list(before)
        self._base = np.array([before[name] for name in names])
        self._saved = [offer.saved(resource, whole, dense.flops) for offer in offers]
        self._owners = [owner_of(offer.candidate) for offer in offers]
        strongest: dict[tuple[str, str], int] = {}
        for index, owner in enumerate(self._owners):
            best = strongest.setdefault(owner, index)
            if self._saved[index] > self._saved[best]:
                strongest[owner] = index
        self._removed: dict[tuple[str, str], np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
        for owner, index in strongest.items():
            after = _amounts(dry_run.nodes(index), resource)
            left = np.array([after.get(name, 0.0) for name in names])
            share = np.divide(left, self._base, out=np.ones(len(names)), where=self._base > 0)
            self._removed[owner] = (1 - share) / (self._saved[index] or 1.0)

    def total(self, chosen: Sequence[int]) -> float:
        """Return what a choice saves in all."""
        return float(self._base.sum() - self._left(chosen).sum())

    def saved(self, chosen: Sequence[int]) -> tuple[list[float], float]:
        """Return what each offer would save beside the others of a choice, and their total.

        Args:
            chosen: Positions of the chosen offers.

        Returns:
            For each offer what it saves where no other level of its target is chosen; and what the
            choice saves in all.
        """
        left = self._left(chosen)
        beside = {
            self._owners[index]: self._left([other for other in chosen if other != index])
            for index in chosen
        }
        amounts = [
            float(((1 - self._share(index)) * beside.get(owner, left)).sum())
            for index, owner in enumerate(self._owners)
        ]
        return amounts, float(self._base.sum() - left.sum())

    def _left(self, chosen: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return what a choice leaves of every operation."""
        left: np.ndarray[tuple[int], np.dtype[np.float64]] = self._base.copy()
        for index in chosen:
            left *= self._share(index)
        return left

    def _share(self, index: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return what an offer leaves of every operation."""
        return 1 - self._removed[self._owners[index]] * self._saved[index]


def _amounts(costs: Mapping[str, Cost], resource: Resource) -> dict[str, float]:
    return {name: spent(cost, resource) for name, cost in costs.items()}
