"""Exchanges of levels between two targets, kept where the measured loss of all changes falls.

Errors do not add up, so the choice with the least sum of losses need not be the one that loses
least.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from graphopt.passes.budget import Budget, spent

from .offers import Offer
from .selection import conflict, owner_of
from .solver import Choice, Solver

MOST_SWAPS = 200
_PATIENCE = 24
_LEAST_GAIN = 0.01
"""Share of the loss that so many swaps in a row must win together; else the choice stands."""

Measure = Callable[[tuple[int, ...]], float]
"""Returns the measured loss of a choice."""


class Swaps:
    """Exchanges of one level for a milder one and of another for a stronger one."""

    def __init__(
        self, solver: Solver, choice: Choice, budget: Budget, measure: Measure, seed: int
    ) -> None:
        """Hold the parts.

        Args:
            solver: Knows the offers and what they save.
            choice: Where to start, with its measured loss and what its dry run costs.
            budget: What the choice met.
            measure: Measures losses.
            seed: Orders swaps of equal predicted gain.
        """
        self._solver = solver
        self._budget = budget
        self._measure = measure
        self._seed = seed
        self._seen = {choice.chosen}
        self._start = choice
        self._best = choice
        self.found: list[Choice] = []
        """The better choices, each with a lower loss than the one before."""

    def run(self) -> Iterator[int]:
        """Measure swaps, the most promising first; yield how many were tried after each.

        What they spend is predicted: making them all takes too long. It ends after `MOST_SWAPS`,
        or when they hardly help any more.
        """
        losses = [self._best.loss]
        waiting = self._candidates()
        for tried in range(1, MOST_SWAPS + 1):
            chosen = next(waiting, None)
            if chosen is None or _is_stalled(losses):
                return
            self._seen.add(chosen)
            loss = self._measure(chosen)
            if loss < self._best.loss:
                self._best = replace(self._start, chosen=chosen, loss=loss)
                self.found.append(self._best)
                waiting = self._candidates()
            losses.append(self._best.loss)
            yield tried

    def _spends(self, chosen: Sequence[int]) -> float:
        """Return what a choice is predicted to spend; times are those of the start."""
        if self._budget.resource == "latency":
            return spent(self._start.cost, "latency")
        return self._solver.predicted(self._budget.resource, self._start, chosen)

    def _candidates(self) -> Iterator[tuple[int, ...]]:
        """Yield the choices one swap away that were not tried, the most promising first."""
        offers, chosen = self._solver.offers, self._best.chosen
        saved = self._solver.saved(self._budget.resource)
        ladders = _ladders(offers, saved, self._solver.unfit)
        present = {owner_of(offers[index].candidate): index for index in chosen}
        spare = self._spends(chosen) - self._start.allowed
        draw = random.Random(self._seed)
        swaps: list[tuple[float, float, set[int], set[int]]] = []
        for given, milder in _steps_down(ladders, present):
            lost = saved[given] - sum(saved[index] for index in milder)
            for owner, ladder in ladders.items():
                current = {present[owner]} if owner in present else set()
                if given in current or owner == owner_of(offers[given].candidate):
                    continue
                base = sum(saved[index] for index in current)
                wanted = base + lost + min(spare, 0.0)
                stronger = {next((i for i in ladder if saved[i] >= wanted > base), -1)}
                if -1 not in stronger:
                    gone, come = {given} | current, milder | stronger
                    loss = _loss(offers, come) - _loss(offers, gone)
                    swaps.append((loss, draw.random(), gone, come))
        for _, _, gone, come in sorted(swaps, key=lambda swap: swap[:2]):
            result = tuple(sorted(set(chosen) - gone | come))
            if (
                result not in self._seen
                and _compatible(offers, result, come)
                and self._solver.is_close(self._spends(result), self._start, self._budget)
            ):
                yield result


def _is_stalled(losses: Sequence[float]) -> bool:
    """Say whether the last swaps hardly lowered the best loss, of which there is one per swap."""
    if len(losses) <= _PATIENCE:
        return False
    before = losses[-1 - _PATIENCE]
    return before - losses[-1] <= _LEAST_GAIN * abs(before)


def _loss(offers: Sequence[Offer], indices: Iterable[int]) -> float:
    return sum(offers[index].candidate.loss or 0.0 for index in indices)


def _compatible(offers: Sequence[Offer], chosen: Iterable[int], come: Iterable[int]) -> bool:
    return not any(
        index != other and conflict(offers[index].candidate, offers[other].candidate)
        for index in come
        for other in chosen
    )


def _ladders(
    offers: Sequence[Offer], saved: Sequence[float], unfit: dict[int, str]
) -> dict[tuple[str, str], list[int]]:
    """Return the levels of each pass and target, from mild to strong."""
    ladders: dict[tuple[str, str], list[int]] = {}
    for index in sorted(range(len(offers)), key=lambda index: saved[index]):
        if index not in unfit and saved[index] > 0:
            ladders.setdefault(owner_of(offers[index].candidate), []).append(index)
    return ladders


def _steps_down(
    ladders: dict[tuple[str, str], list[int]], present: dict[tuple[str, str], int]
) -> Iterator[tuple[int, set[int]]]:
    """Yield each chosen level and, as a set, the next milder one; none for no change."""
    for owner, index in present.items():
        ladder = ladders.get(owner, [])
        if index in ladder:
            position = ladder.index(index)
            yield index, set(ladder[position - 1 : position] if position else [])
