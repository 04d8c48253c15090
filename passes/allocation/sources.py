"""Where the changes of each pass of a pipeline come from: one share for all, or the solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from graphopt.passes.base import Candidate, Context, Cost, Miss, Pass, Proposal
from graphopt.passes.budget import Budget, spent
from graphopt.passes.errors import ConfigError
from graphopt.passes.guard import Guard
from graphopt.passes.loss_model import LossModel
from graphopt.passes.program import Program
from graphopt.passes.snapshot import twin_of

from .allocator import Allocation, Allocator, Progress


class Source(Protocol):
    """Says what each pass is to change."""

    optional: bool
    """Whether a change that does not fit the program any more is left out, not an error."""

    def proposal(self, place: int, program: Program, flops: int) -> tuple[Proposal, Context]:
        """Return what a pass is to change and what not, and what it may know for that.

        Args:
            place: Position of the pass in the pipeline.
            program: The program as it is now.
            flops: What its forward costs now, or would if planned changes had been made.
        """
        ...

    def milder(self, candidate: Candidate) -> Candidate | None:
        """Return what to try where the guard refuses a candidate, None if nothing is left."""
        ...

    def totals(self, before: Cost, after: Cost, program: Program | None) -> tuple[Cost, Cost]:
        """Return the costs of the whole program, with times where the budget is one of time.

        Args:
            before: Cost of the program before any change.
            after: Cost of the program with the changes.
            program: The changed program; None where changes are only planned.
        """
        ...

    def notes(self, before: Cost, after: Cost) -> list[str]:
        """Say how the budget was spent, where a user should know."""
        ...


class UniformSource:
    """Every pass spends what is left of a share of the FLOPs, the same in all places."""

    optional = False

    def __init__(
        self, passes: Sequence[Pass], context: Context, budget: Budget | None, dense: Cost
    ) -> None:
        """Turn the budget into a share.

        Raises:
            ConfigError: if it is of another resource than FLOPs.
        """
        if budget is not None:
            if budget.resource != "flops":
                raise ConfigError(
                    f"a budget of {budget} needs allocation='solver'; uniform allocation spends a "
                    "share of the FLOPs, such as '60%'"
                )
            share = min(budget.allowed(dense) / max(dense.flops, 1), 1.0)
            context = replace(context, budget=share)
        self._passes = passes
        self._context = context
        self._dense = dense

    def proposal(self, place: int, program: Program, flops: int) -> tuple[Proposal, Context]:
        """Return what the pass proposes for what is left of the budget."""
        step, budget = self._passes[place], self._context.budget
        context = self._context
        if budget is not None:
            share = flops / max(self._dense.flops, 1)
            if share > budget * (1 + 1e-9):
                context = replace(context, budget=budget / share)
            elif not step.exact:
                cheaper = flops < self._dense.flops
                reason = "earlier passes already met" if cheaper else "the model already meets"
                reason += " the budget"
                miss = Miss(pass_name=step.name, target="(model)", reason=reason)
                return Proposal(misses=(miss,)), context
        return step.propose(program, context), context

    def milder(self, candidate: Candidate) -> Candidate | None:
        """Return nothing: all places bear the same."""
        return None

    def totals(self, before: Cost, after: Cost, program: Program | None) -> tuple[Cost, Cost]:
        """Return the costs as they are."""
        return before, after

    def notes(self, before: Cost, after: Cost) -> list[str]:
        """Say where the budget is not met."""
        budget = self._context.budget
        share = after.flops / max(before.flops, 1)
        if budget is None or share <= budget * (1 + 1e-9):
            return []
        return [
            f"the budget of {budget:.1%} of the forward FLOPs is not met: {share:.1%} are left; "
            "see the misses for what could not change"
        ]


@dataclass
class SolvedSource:
    """Approximate passes change what the solver chose for all of them together.

    It chooses when the first of them is asked for: the exact passes before have run then.

    Attributes:
        passes: The pipeline.
        context: What the passes may know.
        budget: What the whole pipeline may leave; None takes the context's share of the FLOPs.
        guard: What the result must satisfy.
        dense: A twin of the program before any change.
        seed: Orders equally good choices.
        store: Directory for what was estimated and measured.
        progress: Told about losses and swaps.
    """

    passes: Sequence[Pass]
    context: Context
    budget: Budget | None
    guard: Guard | None
    dense: Program
    seed: int = 0
    store: Path | None = None
    progress: Progress | None = None
    optional: bool = True
    _first: int = 0
    _allocator: Allocator | None = None
    _allocation: Allocation | None = None
    _reported: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Read the budget from the context if there is no other."""
        if self.budget is None and self.context.budget is not None:
            self.budget = Budget(resource="flops", amount=self.context.budget, relative=True)
        self.context = replace(self.context, budget=None)

    def proposal(self, place: int, program: Program, flops: int) -> tuple[Proposal, Context]:
        """Return what an exact pass proposes, or what was chosen for an approximate one."""
        step = self.passes[place]
        if step.exact:
            return step.propose(program, self.context), self.context
        if self._allocation is None:
            self._first = place
            self._allocator = allocator_for(
                program,
                self.passes[place:],
                self.context,
                dense=self.dense,
                seed=self.seed,
                store=self.store,
                progress=self.progress,
            )
            self._allocation = self._allocator.allocate(self.budget, self.guard)
        chosen = [o.offered for o in self._allocation.offers if o.place + self._first == place]
        misses: list[Miss] = []
        if step.name not in self._reported:
            self._reported.add(step.name)
            misses = [m for m in self._allocation.misses if m.pass_name == step.name]
        return Proposal(candidates=tuple(chosen), misses=tuple(misses)), self.context

    def milder(self, candidate: Candidate) -> Candidate | None:
        """Return a weaker level of what was chosen for this target."""
        return None if self._allocator is None else self._allocator.milder(candidate)

    def totals(self, before: Cost, after: Cost, program: Program | None) -> tuple[Cost, Cost]:
        """Return the costs, with times where the budget is one of time."""
        if self._allocator is None or self._allocation is None:
            return before, after
        dense, cost = self._allocation.dense, self._allocation.cost
        if program is None:
            after = cost
        elif dense.latency_ms is not None:
            after = self._allocator.timed(after, program)
        return (before if dense.latency_ms is None else dense), after

    def notes(self, before: Cost, after: Cost) -> list[str]:
        """Say how the choice came about and where the budget is not met."""
        notes = [] if self._allocation is None else list(self._allocation.notes)
        if self.budget is None or (self.budget.resource == "latency" and not self._is_timed()):
            return notes
        amount, allowed = spent(after, self.budget.resource), self.budget.allowed(before)
        if amount > allowed * (1 + 1e-9):
            left = replace(self.budget, amount=amount, relative=False)
            if self.budget.relative:
                share = amount / spent(before, self.budget.resource)
                left = replace(self.budget, amount=round(share, 4))
            notes.append(
                f"the budget of {self.budget} is not met: {left} is left; see the misses for what "
                "could not change"
            )
        return notes

    def _is_timed(self) -> bool:
        cost = None if self._allocation is None else self._allocation.cost
        return cost is not None and cost.latency_ms is not None


def allocator_for(
    program: Program,
    steps: Sequence[Pass],
    context: Context,
    *,
    dense: Program | None = None,
    seed: int = 0,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Allocator:
    """Return an allocator whose losses are the loss model's; arguments as in `Allocator`."""
    numeric = not any(parameter.is_meta for parameter in program.model.parameters())
    losses = LossModel(program, context, store=store, progress=progress) if numeric else None
    return Allocator(
        program,
        steps,
        context,
        dense=dense or twin_of(program),
        losses=losses,
        seed=seed,
        store=store,
        progress=progress,
    )
