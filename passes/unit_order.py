"""An order of interchangeable units that gathers what matters in few blocks of sparse matrices.

The rows of some matrices and the columns of others are the same hidden units, so one order of the
units decides for all of them which elements share a block. It is found by exchanges that never
lose kept energy: with the kept blocks fixed, every unit has a gain at every place, and two groups
of places swap the units that gain most together; then the kept blocks are chosen again. Starts are
the given order and units sorted by what they use. The module knows no graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_SWEEPS = 30
_PAIRS_PER_PLACE = 8


@dataclass(frozen=True)
class UnitMatrix:
    """A matrix whose rows or columns hold units, as the search sees it.

    Attributes:
        energy: [indices, others] float64: per index along the units' dimension what its elements
            weigh, summed over each block of the other dimension.
        units: [units, copies]: the indices of every unit.
        block: Indices per block along the units' dimension.
        kept: Blocks that every row tile keeps.
        rows: Whether the units are rows; else they are columns.
    """

    energy: np.ndarray
    units: np.ndarray
    block: int
    kept: int
    rows: bool

    def tiles(self, order: np.ndarray) -> np.ndarray:
        """Return the energy of every block [blocks along the units, others] in an order."""
        source = np.arange(self.energy.shape[0])
        source[self.units] = self.units[order]
        summed: np.ndarray = (
            self.energy[source].reshape(-1, self.block, self.energy.shape[1]).sum(1)
        )
        return summed

    def mask(self, order: np.ndarray) -> np.ndarray:
        """Return which blocks are kept: those with most energy, equally many per row tile."""
        tiles = self.tiles(order)
        axis = 1 if self.rows else 0
        chosen = np.argsort(-tiles, axis=axis, kind="stable").take(range(self.kept), axis)
        mask = np.zeros_like(tiles)
        np.put_along_axis(mask, chosen, 1.0, axis)
        return mask

    def places(self) -> np.ndarray:
        """Return the block along the units' dimension of every place [units, copies]."""
        blocks: np.ndarray = self.units // self.block
        return blocks


def kept_energy(matrices: Sequence[UnitMatrix], order: np.ndarray) -> float:
    """Return the mean over the matrices of the share of energy that stays in an order."""
    shares = [float((m.tiles(order) * m.mask(order)).sum() / _total(m)) for m in matrices]
    return float(np.mean(shares))


def best_order(matrices: Sequence[UnitMatrix]) -> torch.Tensor | None:
    """Return the unit that comes at every place [units], None if none keeps more energy.

    Deterministic. Cost: for n units, c distinct places and b blocks about 30 times `n c b`
    multiply-adds and 8 c small sorts.
    """
    count = matrices[0].units.shape[0]
    identity = np.arange(count)
    best, most = identity, kept_energy(matrices, identity)
    given = most
    for start in (identity, *_starts(matrices)):
        order, energy = _improved(matrices, start)
        if energy > most:
            best, most = order, energy
    # What rounding of the sums alone can gain is no reason to move anything.
    return None if most <= given * (1 + 1e-9) else torch.from_numpy(best)


def _total(matrix: UnitMatrix) -> float:
    return float(matrix.energy.sum()) or 1.0


def _improved(matrices: Sequence[UnitMatrix], order: np.ndarray) -> tuple[np.ndarray, float]:
    """Exchange units until the kept energy stands still."""
    places = np.concatenate([matrix.places() for matrix in matrices], axis=1)
    kinds, kind_of_place = np.unique(places, axis=0, return_inverse=True)
    kind_of_place = kind_of_place.reshape(-1)
    energy = kept_energy(matrices, order)
    for _ in range(_SWEEPS):
        gain = _gains(matrices, order, kinds)
        kind_of_unit = np.empty_like(kind_of_place)
        kind_of_unit[order] = kind_of_place
        _exchange(gain, kind_of_unit)
        order = np.empty_like(order)
        # Units of one kind of place are interchangeable: they stay in ascending order.
        order[np.argsort(kind_of_place, kind="stable")] = np.argsort(kind_of_unit, kind="stable")
        before, energy = energy, kept_energy(matrices, order)
        if energy <= before * (1 + 1e-6):
            break
    return order, energy


def _gains(matrices: Sequence[UnitMatrix], order: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return what every unit keeps at every kind of place [units, kinds], kept blocks fixed."""
    gain = np.zeros((len(order), len(kinds)))
    column = 0
    for matrix in matrices:
        mask = matrix.mask(order) / _total(matrix)
        for copy in range(matrix.units.shape[1]):
            gain += matrix.energy[matrix.units[:, copy]] @ mask[kinds[:, column]].T
            column += 1
    return gain


def _exchange(gain: np.ndarray, kind_of_unit: np.ndarray) -> None:
    """Swap units between pairs of kinds of places, in place, where both together gain."""
    count = gain.shape[1]
    rise = gain - gain[np.arange(len(gain)), kind_of_unit][:, None]
    largest = np.full((count, count), -np.inf)
    np.maximum.at(largest, kind_of_unit, rise)
    hope = np.triu(largest + largest.T, 1)
    ranked = np.argsort(-hope, axis=None, kind="stable")[: _PAIRS_PER_PLACE * count]
    for pair in ranked[hope.reshape(-1)[ranked] > 0]:
        first, second = divmod(int(pair), count)
        ours, theirs = np.flatnonzero(kind_of_unit == first), np.flatnonzero(kind_of_unit == second)
        there = gain[ours, second] - gain[ours, first]
        here = gain[theirs, first] - gain[theirs, second]
        ours, theirs = ours[np.argsort(-there)], theirs[np.argsort(-here)]
        together = np.sort(there)[::-1] + np.sort(here)[::-1]
        swaps = int((together > 0).sum())
        kind_of_unit[ours[:swaps]] = second
        kind_of_unit[theirs[:swaps]] = first


def _starts(matrices: Sequence[UnitMatrix]) -> list[np.ndarray]:
    """Return orders of units sorted by the column groups they read and the outputs they reach."""
    used: list[np.ndarray] = []
    strength = np.zeros(len(matrices[0].units))
    clusters: list[np.ndarray] = []
    for matrix in matrices:
        energy = matrix.energy[matrix.units].sum(1)
        strength += energy.sum(1) / _total(matrix)
        if matrix.rows:
            clusters.append(_clusters(energy, matrix.energy.shape[0] // matrix.block, matrix.kept))
        else:
            share = matrix.kept * matrix.block / matrix.energy.shape[0]
            used.extend((energy > np.quantile(energy, 1 - share, axis=0)).T)
    keys = [-strength, *(~column for column in used)]
    return [np.lexsort(keys), *(np.lexsort((*keys, cluster)) for cluster in clusters)]


def _clusters(energy: np.ndarray, count: int, kept: int) -> np.ndarray:
    """Group units by the `kept` columns that hold most of their energy [units].

    Seeds are farthest first: each next one is the unit that the sets so far serve worst.
    """

    def columns(values: np.ndarray) -> np.ndarray:
        chosen = np.zeros(energy.shape[1])
        chosen[np.argsort(-values, kind="stable")[:kept]] = 1.0
        return chosen

    alone = np.sort(energy, axis=1)[:, -kept:].sum(1)
    sets = [columns(energy[alone.argmax()])]
    for _ in range(count - 1):
        served = np.max(energy @ np.stack(sets, axis=1), axis=1)
        sets.append(columns(energy[(alone - served).argmax()]))
    nearest = (energy @ np.stack(sets, axis=1)).argmax(1)
    for _ in range(_SWEEPS):
        sets = [columns(energy[nearest == i].sum(0)) for i in range(count)]
        before, nearest = nearest, (energy @ np.stack(sets, axis=1)).argmax(1)
        if np.array_equal(before, nearest):
            break
    result: np.ndarray = nearest
    return result
