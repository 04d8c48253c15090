"""From a program and a pipeline to the changes worth making under a budget and a guard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graphopt.passes.base import Candidate, Context, Cost, Miss, Pass
from graphopt.passes.budget import Budget, Resource, spent
from graphopt.passes.errors import ConfigError
from graphopt.passes.guard import GIVEN_UP, Guard
from graphopt.passes.program import Program

from .dry_run import DryRun
from .journal import Journal, journal_path
from .offers import Losses, Offer, collect_offers, with_estimate, without_numbers
from .selection import owner_of
from .solver import Choice, Solver
from .swaps import MOST_SWAPS, Swaps

_BISECTIONS = 7

Progress = Callable[[str, int, int], None]
"""Called with a label, steps done and steps in all."""


@dataclass(frozen=True)
class Allocation:
    """What is worth changing.

    Attributes:
        offers: The chosen ones, in the order of the pipeline.
        misses: Everything else, one miss for each target of each pass.
        notes: What a user should know of how the choice came about.
        dense: Cost of the dense program.
        cost: Cost of the program with all chosen changes, by dry run.
        loss: Loss of all chosen changes, measured where that is possible.
    """

    offers: tuple[Offer, ...]
    misses: tuple[Miss, ...]
    notes: tuple[str, ...]
    dense: Cost
    cost: Cost
    loss: float


class Allocator:
    """Collects offers and losses once, and chooses under any number of budgets."""

    def __init__(
        self,
        program: Program,
        steps: Sequence[Pass],
        context: Context,
        *,
        dense: Program,
        losses: Losses | None,
        seed: int = 0,
        store: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Collect offers and estimate their losses.

        An interruption leaves the offers without an estimate out.

        Args:
            program: The program as it is where the first approximate pass stands.
            steps: The rest of the pipeline.
            context: What the passes may know.
            dense: The program before any change.
            losses: Estimates and measures losses; None for programs without numbers.
            seed: Orders equally good choices.
            store: Directory for what was estimated and measured.
            progress: Told about losses and swaps.

        Raises:
            KeyboardInterrupt: if not a single loss was estimated yet.
        """
        self._program = program
        self._context = context
        self._losses = losses
        self._seed = seed
        self._progress = progress
        self._notes: list[str] = []
        self._journal = Journal(journal_path(store, program, steps, context))
        offers, self._refused = collect_offers(program, steps, context)
        self._offers = self._estimated(offers)
        dry_run = DryRun(program, steps, context, self._offers, dense)
        self._solver = Solver(self._offers, dry_run)

    def allocate(self, budget: Budget | None, guard: Guard | None) -> Allocation:
        """Return what to change: the mildest choice that meets the budget, within the guard.

        Without a budget it is the cheapest choice that the guard is expected to allow.

        Raises:
            ConfigError: if there is neither a budget nor a guard, or a latency is asked for and
                nothing measures it.
            KeyboardInterrupt: if losses were interrupted before the budget could be met.
        """
        self._check(budget, guard)
        fits = self._expectation(guard)
        budget = budget or self._least()
        choice, notes = self._improved(self._solver.solve(budget), budget)
        wanted = choice
        if not fits(choice.chosen):
            choice, budget = self._within(choice, budget.resource, fits)
            choice, more = self._improved(choice, budget)
            notes += more
        if self._notes and not choice.met:
            raise KeyboardInterrupt
        return Allocation(
            offers=tuple(self._offers[index] for index in choice.chosen),
            misses=tuple(self._misses(choice, wanted, budget)),
            notes=(*self._notes, *notes),
            dense=self._solver.dry_run.dense,
            cost=choice.cost,
            loss=choice.loss,
        )

    def milder(self, candidate: Candidate) -> Candidate | None:
        """Return the strongest offer for the same target that is expected to drift half as much."""
        same = [o for o in self._offers if owner_of(o.offered) == owner_of(candidate)]
        found = next((o.candidate.loss for o in same if o.offered == candidate), None)
        if found is None:
            return None
        weaker = [o for o in same if (o.candidate.loss or 0.0) <= found / 4]
        return max(weaker, key=lambda o: o.candidate.loss or 0.0).offered if weaker else None

    def solve(self, budget: Budget) -> Choice:
        """Return the choice for a budget with its loss measured, without swaps."""
        self._check(budget, None)
        choice = self._solver.solve(budget)
        return replace(choice, loss=self._measured(choice.chosen))

    @property
    def dense(self) -> Cost:
        """Cost of the dense program, with a time once one was asked for."""
        return self._solver.dry_run.dense

    def timed(self, cost: Cost, program: Program) -> Cost:
        """Return the cost of a program with its time as it is now, in turns with the dense one."""
        return self._solver.dry_run.timed(cost, program)

    def _check(self, budget: Budget | None, guard: Guard | None) -> None:
        if budget is None and guard is None:
            raise ConfigError(
                "allocation='solver' needs a budget such as '60%' or '12ms', or a guard"
            )
        if budget is not None and budget.resource == "latency" and self._context.costs is None:
            raise ConfigError(
                f"a budget of {budget} needs measured times; measure them, or give a budget of "
                "FLOPs, parameters or bytes"
            )

    def _estimated(self, offers: Sequence[Offer]) -> list[Offer]:
        """Return the offers with their losses; those that were reached before an interruption."""
        if self._losses is None:
            return [without_numbers(self._program, offer) for offer in offers]
        found: list[Offer] = []
        try:
            for number, offer in enumerate(offers):
                estimate = self._journal.estimate(offer.offered)
                if estimate is None:
                    estimate = self._losses.estimate(offer.step, offer.offered)
                    self._journal.add_estimate(offer.offered, estimate)
                found.append(with_estimate(offer, estimate))
                self._tell("losses", number + 1, len(offers))
        except KeyboardInterrupt:
            if not found:
                raise
            self._notes.append(f"interrupted: {len(found)} of {len(offers)} losses are known")
        finally:
            self._journal.write()
        return found

    def _improved(self, choice: Choice, budget: Budget) -> tuple[Choice, list[str]]:
        """Return the choice after measured swaps, and notes."""
        if self._losses is None or not choice.chosen:
            return choice, []
        notes: list[str] = []
        found: list[Choice] = []
        tried = 0
        try:
            choice = replace(choice, loss=self._measured(choice.chosen))
            swaps = Swaps(self._solver, choice, budget, self._measured, self._seed)
            found = swaps.found
            if choice.met and not self._notes:
                for tried in swaps.run():
                    self._tell("solve", tried, MOST_SWAPS)
        except KeyboardInterrupt:
            notes.append(f"interrupted: best of {tried} swaps")
        finally:
            self._journal.write()
        return self._verified(choice, found, budget), notes

    def _verified(self, choice: Choice, better: Sequence[Choice], budget: Budget) -> Choice:
        """Return the best of some choices that is within the budget, found by halving.

        Args:
            choice: One that is known to be within it.
            better: Others with what they are predicted to cost, each better than the one before.
            budget: The budget.
        """
        low, high = 0, len(better)
        middle = high
        while low < high:
            found = better[middle - 1]
            made = self._solver.realized(choice, found.chosen, budget)
            met = made.met and made.chosen == found.chosen
            if met and self._solver.is_close(spent(made.cost, budget.resource), choice, budget):
                low, choice = middle, replace(made, loss=found.loss)
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return choice

    def _measured(self, chosen: tuple[int, ...]) -> float:
        """Return the measured loss of a choice, the sum of losses where nothing can be run."""
        offers = [self._offers[index] for index in chosen]
        if self._losses is None:
            return sum(offer.candidate.loss or 0.0 for offer in offers)
        changes = [offer.offered.change for offer in offers]
        found = self._journal.loss(changes)
        if found is None:
            found = self._losses.measure(self._pairs(chosen))
            self._journal.add_loss(changes, found)
        return found

    def _pairs(self, chosen: tuple[int, ...]) -> list[tuple[Pass, Candidate]]:
        offers = (self._offers[index] for index in chosen)
        return [(offer.step, offer.candidate) for offer in offers]

    def _least(self) -> Budget:
        """Return a budget that nothing meets: of time where it is measured, else of FLOPs."""
        resource: Resource = "flops" if self._context.costs is None else "latency"
        return Budget(resource=resource, amount=1e-9, relative=True)

    def _expectation(self, guard: Guard | None) -> Callable[[tuple[int, ...]], bool]:
        """Return what says whether a choice is expected to satisfy a guard.

        The guard itself is asked, with the changes made for a while; without numbers, their losses.
        """
        if guard is None:
            return lambda _: True
        losses = self._losses
        if losses is None:
            limit = _loss_limit(guard)
            return lambda chosen: self._measured(chosen) <= limit
        check = guard.prepare(self._program, [self._program.example])

        def fits(chosen: tuple[int, ...]) -> bool:
            if not chosen:
                return True
            with losses.made(self._pairs(chosen)) as program:
                return check.check(program).ok

        return fits

    def _within(
        self, choice: Choice, resource: Resource, fits: Callable[[tuple[int, ...]], bool]
    ) -> tuple[Choice, Budget]:
        """Return the choice that saves most of those expected to fit a guard, and what it spends.

        It is found by halving what is predicted to be spent, so that no noise of a timed dry run
        decides what is tried.

        Args:
            choice: One that saves more and does not fit.
            resource: What is spent.
            fits: Says whether a choice is expected to fit.
        """
        low, high = spent(choice.cost, resource), spent(self.dense, resource)
        best: tuple[int, ...] = ()
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            chosen = self._solver.select(resource, middle, 0.98 * middle)
            if chosen is not None and fits(chosen):
                best, high = chosen, middle
            else:
                low = middle
        found = self._solver.spending(best, resource)
        return found, Budget(resource=resource, amount=found.allowed, relative=False)

    def _misses(self, choice: Choice, wanted: Choice, budget: Budget) -> list[Miss]:
        """Return one miss for each target of each pass that is not changed.

        Args:
            choice: What is changed.
            wanted: What would be changed without a guard.
            budget: What may be spent.
        """
        chosen = {owner_of(self._offers[index].candidate) for index in choice.chosen}
        reasons: dict[tuple[str, str], str] = {}
        for index in wanted.chosen if wanted != choice else ():
            candidate = self._offers[index].candidate
            alone = math.sqrt(max(candidate.loss or 0.0, 0.0))
            reasons[owner_of(candidate)] = (
                f"{GIVEN_UP}{candidate.change.summary} is expected to drift by {alone:.2g} alone, "
                "and the guard leaves no room for it beside the others"
            )
        for index, offer in enumerate(self._offers):
            reason = self._solver.unfit.get(index) or self._why_not(offer, choice, budget)
            reasons.setdefault(owner_of(offer.candidate), reason)
        for miss in self._refused:
            reasons.setdefault((miss.pass_name, miss.target), miss.reason)
        return [
            Miss(pass_name=name, target=target, reason=reason)
            for (name, target), reason in reasons.items()
            if (name, target) not in chosen
        ]

    def _why_not(self, offer: Offer, choice: Choice, budget: Budget) -> str:
        claimed = offer.candidate.shared | offer.candidate.exclusive
        for index in choice.chosen:
            other = self._offers[index].candidate
            if not claimed.isdisjoint(other.exclusive) or not offer.candidate.exclusive.isdisjoint(
                other.shared
            ):
                return f"{other.change.pass_name} loses less here: {other.change.summary}"
        if not choice.met:
            return "left as it is: the cheapest choice that was found is without it"
        share = budget.allowed(self.dense) / spent(self.dense, budget.resource)
        return f"left as it is: at {share:.0%} of the {budget.resource} the rest loses less"

    def _tell(self, label: str, done: int, total: int) -> None:
        if self._progress:
            self._progress(label, done, total)


def _loss_limit(guard: Guard) -> float:
    """Return the loss at which a guard is expected to refuse, infinite for a score alone.

    The loss is the squared relative error; rows of equal length with the cosine c are
    sqrt(2 (1 - c)) apart.
    """
    limits = [math.inf]
    if guard.max_drift is not None:
        limits.append(guard.max_drift**2)
    if guard.min_cosine is not None:
        limits.append(2 * (1 - guard.min_cosine))
    return min(limits)
