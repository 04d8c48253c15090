"""The choice that meets a budget: solved to first order, dry-run, corrected, solved again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from graphopt.passes.base import Cost
from graphopt.passes.budget import Budget, Resource, spent

from .dry_run import DryRun, Realized
from .interactions import Interactions
from .offers import Offer
from .selection import select, select_strongest

_ROUNDS = 10
_TIMED_ROUNDS = 6
_LEAST_FACTOR = 0.1
"""Smallest share of its predicted savings of time that a choice is taken to have saved."""
_FREE_ROUNDS = 3
"""Rounds before it is looked at how changes interact; most models need no more."""
_INNER_ROUNDS = 12
_TOLERANCES: Mapping[Resource, float] = {
    "flops": 0.02,
    "parameters": 0.02,
    "bytes": 0.02,
    "latency": 0.08,
}
"""How far below the budget a choice may stay, as a share of it."""


@dataclass(frozen=True)
class Choice:
    """Offers chosen under a budget.

    Attributes:
        chosen: Positions of the offers.
        cost: Of the whole program as the dry run found it.
        loss: Sum of their losses, or the measured loss of all of them together.
        allowed: What was to be spent.
        met: Whether no more is spent.
    """

    chosen: tuple[int, ...]
    cost: Cost
    loss: float
    allowed: float
    met: bool


@dataclass
class Solver:
    """Chooses among offers.

    Savings add up to first order only (widths multiply in convolutions, eight bits save less on a
    narrower layer), so each pass's savings are scaled by what they came to in the last dry run,
    and the program is solved again until the dry run meets the budget.

    Attributes:
        offers: What may be chosen, with losses.
        dry_run: Tells what a choice really costs.
        unfit: Offers that turned out not to fit beside others: position -> the sentence.
        factors: What each pass's savings came to, over what they add up to: place -> factor.
        rest: What the exact passes saved.
    """

    offers: Sequence[Offer]
    dry_run: DryRun
    unfit: dict[int, str] = field(default_factory=dict)
    factors: dict[int, float] = field(default_factory=dict)
    rest: float = 0.0
    _timed_factors: list[float] = field(default_factory=list)
    _interactions: dict[Resource, Interactions] = field(default_factory=dict)

    def solve(self, budget: Budget) -> Choice:
        """Return the choice with the least loss whose dry run meets the budget.

        Where the levels are too coarse to come within the tolerance of the budget, the choice that
        comes closest from below; where nothing meets it, the one that spends least.
        """
        resource = budget.resource
        timed = resource == "latency"
        tolerance = _TOLERANCES[resource]
        self.factors, self.rest, self._timed_factors = {}, 0.0, []
        nothing = self.dry_run.realize((), timed=timed)
        dense = self.dry_run.dense
        allowed = budget.allowed(dense)
        self._learn(resource, (), nothing)
        found = [self._choice((), nothing, resource, allowed)]
        if found[0].met:
            return found[0]
        for number in range(_TIMED_ROUNDS if timed else _ROUNDS):
            # The middle of what is tolerated is the safer aim where times are noisy.
            aim = 1 - tolerance / (4 if timed else 100)
            least = (1 - tolerance) * allowed
            if timed or number < _FREE_ROUNDS or not self.dry_run.has_numbers:
                chosen = self.select(resource, aim * allowed, least)
            else:
                best = min(found, key=lambda choice: _distance(choice, resource))
                chosen = self._beside(resource, best, aim * allowed, least)
            if chosen is None:
                chosen = self.strongest(resource)
                if chosen in [choice.chosen for choice in found if not choice.met]:
                    break
            if chosen in [choice.chosen for choice in found]:
                continue
            realized = self.dry_run.realize(chosen, timed=timed)
            self.unfit.update(realized.unfit)
            self._learn(resource, chosen, realized)
            found.append(self._choice(chosen, realized, resource, allowed))
            if least <= spent(realized.cost, resource) <= allowed:
                break
        return min(found, key=lambda choice: _rank(choice, resource, tolerance))

    def is_close(self, amount: float, choice: Choice, budget: Budget) -> bool:
        """Say whether an amount meets a choice's budget and is no further below it than tolerated.

        A choice that is further below it itself is no worse for another one that is so too.
        """
        least = (1 - _TOLERANCES[budget.resource]) * choice.allowed
        least = min(least, spent(choice.cost, budget.resource))
        return least <= amount <= choice.allowed * (1 + 1e-9)

    def _beside(
        self, resource: Resource, choice: Choice, most: float, least: float
    ) -> tuple[int, ...] | None:
        """Return a choice whose savings are linearised around others until they agree.

        Args:
            resource: What is spent.
            choice: Where to start; its dry run corrects the predictions.
            most: The amount that may be spent.
            least: Spend no less, if the levels allow it.
        """
        model = self._model(resource)
        dense = spent(self.dry_run.dense, resource)
        error = dense - spent(choice.cost, resource) - model.total(choice.chosen)
        chosen = choice.chosen
        for moves in range(_INNER_ROUNDS, 0, -1):
            amounts, total = model.saved(chosen)
            # The part of the savings that the linear form does not see at this choice.
            apart = error + total - sum(amounts[index] for index in chosen)
            left = dense - apart
            found = self._select(amounts, left - most, left - least, (chosen, moves))
            if found is None:
                return None
            chosen = found
            spends = dense - error - model.total(chosen)
            if least <= spends <= most:
                break
        return chosen

    def predicted(self, resource: Resource, choice: Choice, chosen: Sequence[int]) -> float:
        """Return what a choice is predicted to spend, from another one and its dry run.

        Operations only, parameters or bytes: how changes act on each other is known of those.
        """
        model = self._model(resource)
        less = model.total(chosen) - model.total(choice.chosen)
        return spent(choice.cost, resource) - less

    def _model(self, resource: Resource) -> Interactions:
        if resource not in self._interactions:
            self._interactions[resource] = Interactions(self.offers, self.dry_run, resource)
        return self._interactions[resource]

    def select(self, resource: Resource, most: float, least: float) -> tuple[int, ...] | None:
        """Return the choice that is predicted to lose least within an amount, None if none is.

        Args:
            resource: What is spent.
            most: The amount that may be spent.
            least: Spend no less, if the levels allow it.
        """
        left = spent(self.dry_run.dense, resource) - self.rest
        return self._select(self.saved(resource), left - most, left - least)

    def strongest(self, resource: Resource) -> tuple[int, ...]:
        """Return the choice that is predicted to save most."""
        saved = self.saved(resource)
        usable = [index for index in range(len(self.offers)) if index not in self.unfit]
        chosen = select_strongest(
            [self.offers[index].candidate for index in usable], [saved[index] for index in usable]
        )
        return tuple(usable[index] for index in chosen)

    def _select(
        self,
        saved: Sequence[float],
        lowest: float,
        highest: float,
        near: tuple[Sequence[int], int] | None = None,
    ) -> tuple[int, ...] | None:
        """Return the choice that loses least and saves so much, None if nothing does."""
        usable = [index for index in range(len(self.offers)) if index not in self.unfit]
        candidates = [self.offers[index].candidate for index in usable]
        amounts = [saved[index] for index in usable]
        chosen = None
        if near is not None:
            start = [usable.index(index) for index in near[0]]
            chosen = select(
                candidates, amounts, lowest=lowest, highest=highest, near=(start, near[1])
            )
        if chosen is None:
            chosen = select(candidates, amounts, lowest=lowest, highest=highest)
        if chosen is None:
            chosen = select(candidates, amounts, lowest=lowest)
        return None if chosen is None else tuple(usable[index] for index in chosen)

    def saved(self, resource: Resource) -> list[float]:
        """Return what each offer saves, by what the last dry run taught."""
        dense = self.dry_run.dense
        whole = spent(dense, resource)
        return [
            offer.saved(resource, whole, dense.flops) * self.factors.get(offer.place, 1.0)
            for offer in self.offers
        ]

    def spending(self, chosen: tuple[int, ...], resource: Resource) -> Choice:
        """Return a choice that may spend what its dry run costs; times are noisy and may be more.

        Offers that do not fit beside the others are left out.
        """
        realized = self.dry_run.realize(chosen, timed=resource == "latency")
        self.unfit.update(realized.unfit)
        allowed = spent(realized.cost, resource)
        if resource == "latency":
            allowed *= 1 + _TOLERANCES[resource] / 4
        return self._choice(chosen, realized, resource, allowed)

    def realized(self, choice: Choice, chosen: tuple[int, ...], budget: Budget) -> Choice:
        """Return another choice under the same budget, with what its dry run costs."""
        realized = self.dry_run.realize(chosen, timed=budget.resource == "latency")
        found = self._choice(chosen, realized, budget.resource, choice.allowed)
        return found if not realized.unfit else replace(found, met=False)

    def _choice(
        self, chosen: tuple[int, ...], realized: Realized, resource: Resource, allowed: float
    ) -> Choice:
        fitting = tuple(index for index in chosen if index not in realized.unfit)
        return Choice(
            chosen=fitting,
            cost=realized.cost,
            loss=sum(self.offers[index].candidate.loss or 0.0 for index in fitting),
            allowed=allowed,
            met=spent(realized.cost, resource) <= allowed * (1 + 1e-9),
        )

    def _learn(self, resource: Resource, chosen: tuple[int, ...], realized: Realized) -> None:
        """Take the factors from a dry run."""
        dense = self.dry_run.dense
        whole = spent(dense, resource)
        expected: dict[int, float] = {}
        for index in chosen:
            offer = self.offers[index]
            saved = offer.saved(resource, whole, dense.flops)
            expected[offer.place] = expected.get(offer.place, 0.0) + saved
        if resource == "latency":
            if not chosen:
                self.rest = whole - spent(realized.cost, resource)
                return
            came_to = whole - self.rest - spent(realized.cost, resource)
            total = sum(expected.values())
            if total > 0:
                # Times are noisy: all dry runs together say more than the last one.
                self._timed_factors.append(max(came_to / total, _LEAST_FACTOR))
                places = {offer.place for offer in self.offers}
                self.factors = dict.fromkeys(places, median(self._timed_factors))
            return
        start = spent(self.dry_run.start, resource)
        left = [start, *(spent(cost, resource) for cost in realized.steps)]
        for place, total in expected.items():
            came_to = left[place] - left[place + 1]
            if total > 0 and came_to > 0:
                self.factors[place] = came_to / total
        saved = sum(total * self.factors.get(place, 1.0) for place, total in expected.items())
        self.rest = whole - left[-1] - saved


def _rank(choice: Choice, resource: Resource, tolerance: float) -> tuple[float, ...]:
    """Order choices: within the tolerance by loss, then close below the budget, then above it.

    Times are noisy: one that is above the budget by no more than the tolerance counts as close.
    """
    share = spent(choice.cost, resource) / choice.allowed
    if choice.met and share >= 1 - tolerance:
        return 0.0, choice.loss
    if resource == "latency" and abs(share - 1) <= tolerance:
        return 1.0, share
    return (2.0, -share) if choice.met else (3.0, share)


def _distance(choice: Choice, resource: Resource) -> float:
    return abs(spent(choice.cost, resource) - choice.allowed)
