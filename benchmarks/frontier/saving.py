"""Compute at equal loss: how much less a method spends than the dense model at the same loss.

saving = 1 - C_method / C_dense(loss of the method)

C_dense(loss) inverts the dense model's frontier: mean loss by budget, made monotone, linear in the
logarithm of the budget. Intervals are of the bootstrap over seeds, which both arms share.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .trial import Trial

_DRAWS = 4000
_CONFIDENCE = 0.95

Frontier = Sequence[tuple[float, float]]
"""Budgets with their mean losses, both monotone."""

_Seeds = Callable[[Sequence[Trial]], Sequence[Trial]]
"""Draws from the trainings of an arm."""


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its two-sided 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Method minus dense model at the full budget.

    Attributes:
        value: Mean difference.
        upper: One-sided 95 % upper bound.
    """

    value: float
    upper: float


def frontier(losses: Mapping[float, Sequence[float]]) -> Frontier:
    """Return the monotone frontier of losses by budget: more compute never loses more.

    Neighbours that are in the wrong order are averaged (isotonic regression), by their numbers of
    seeds.
    """
    pools: list[tuple[list[float], float, int]] = []
    for budget in sorted(losses):
        pools.append(([budget], statistics.fmean(losses[budget]), len(losses[budget])))
        while len(pools) > 1 and pools[-2][1] < pools[-1][1]:
            (budgets, loss, count), (more, other, others) = pools[-2:]
            mean = (loss * count + other * others) / (count + others)
            pools[-2:] = [(budgets + more, mean, count + others)]
    return [(budget, loss) for budgets, loss, _ in pools for budget in budgets]


def compute_at(loss: float, points: Frontier) -> float:
    """Return the smallest budget at which the frontier reaches a loss.

    A loss below all of the frontier counts as its last budget, one above all as its first: what is
    beyond was not measured. So savings are never claimed from outside of the frontier.
    """
    before: tuple[float, float] | None = None
    for budget, reached in points:
        if reached <= loss:
            if before is None or before[1] == reached:
                return budget
            share = (before[1] - loss) / (before[1] - reached)
            return math.exp((1 - share) * math.log(before[0]) + share * math.log(budget))
        before = (budget, reached)
    return points[-1][0]


def saving(method: Sequence[Trial], dense: Mapping[float, Sequence[Trial]]) -> Interval:
    """Return which share of the operations a method saves at equal loss.

    A method that loses more than the whole frontier at its smallest budget is compared with that
    budget, one that loses less than all of it with the full budget.
    """

    def value(seeds: _Seeds) -> float:
        points = _frontier_of(dense, seeds)
        if _loss(method, seeds) > points[0][1]:
            return -math.inf
        return 1 - _spent(method, points, seeds)

    return _bootstrap(value, (method, *dense.values()))


def saving_over(
    method: Sequence[Trial], control: Sequence[Trial], dense: Mapping[float, Sequence[Trial]]
) -> Interval:
    """Return which share of the operations a method saves against another way to save.

    1 - (C_method / C_dense(loss of the method)) / (C_control / C_dense(loss of the control))

    What is beyond the frontier's ends counts as its end, as in `saving`: a control that loses more
    than all of it is taken for better than it is, and a method or a control that loses less than
    all of it for worse.
    """

    def value(seeds: _Seeds) -> float:
        points = _frontier_of(dense, seeds)
        return 1 - _spent(method, points, seeds) / _spent(control, points, seeds)

    return _bootstrap(value, (method, control, *dense.values()))


def _frontier_of(dense: Mapping[float, Sequence[Trial]], seeds: _Seeds) -> Frontier:
    return frontier({_flops(trials): [t.loss for t in seeds(trials)] for trials in dense.values()})


def _spent(trials: Sequence[Trial], points: Frontier, seeds: _Seeds) -> float:
    """Return the operations of an arm over those of the dense model at the arm's loss."""
    return _flops(seeds(trials)) / compute_at(_loss(trials, seeds), points)


def _flops(trials: Sequence[Trial]) -> float:
    return statistics.fmean(trial.flops for trial in trials)


def _loss(trials: Sequence[Trial], seeds: _Seeds) -> float:
    return statistics.fmean(trial.loss for trial in seeds(trials))


def difference(
    method: Sequence[Trial], dense: Sequence[Trial], measure: Callable[[Trial], float]
) -> Difference:
    """Return by how much the method exceeds the dense model, seed by seed (Student's t)."""
    from scipy.stats import t as student

    by_seed = {trial.seed: measure(trial) for trial in dense}
    pairs = [measure(trial) - by_seed[trial.seed] for trial in method if trial.seed in by_seed]
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, math.inf)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(mean, mean + float(student.ppf(_CONFIDENCE, len(pairs) - 1)) * error)


def _bootstrap(value: Callable[[_Seeds], float], arms: Sequence[Sequence[Trial]]) -> Interval:
    """Return a value of all seeds, and its interval over draws of seeds.

    One draw of seeds goes for all arms, so that what a seed does to both cancels. An arm takes as
    many of them as it has itself, as fewer seeds know less, and for those that it lacks others of
    its own.
    """
    seeds = sorted({trial.seed for trials in arms for trial in trials})
    draws = random.Random(0)
    found = []
    for _ in range(_DRAWS):
        drawn = draws.choices(seeds, k=len(seeds))

        def resampled(trials: Sequence[Trial], drawn: Sequence[int] = drawn) -> Sequence[Trial]:
            by_seed = {trial.seed: trial for trial in trials}
            return [by_seed.get(seed) or draws.choice(trials) for seed in drawn[: len(trials)]]

        found.append(value(resampled))
    found.sort()
    tail = (1 - _CONFIDENCE) / 2
    return Interval(
        value(lambda trials: trials),
        found[int(tail * _DRAWS)],
        found[int((1 - tail) * _DRAWS) - 1],
    )
