"""What accuracy costs: the solver at many budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphopt.passes.base import Cost
from graphopt.passes.budget import Budget

from .allocator import Allocator


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget and what it leads to.

    Attributes:
        budget: The budget.
        dense: Cost of the dense program.
        cost: Cost of the whole program with the chosen changes: measured where times are asked
            for.
        loss: Squared relative error of the outputs with all chosen changes.
        changes: Number of them.
        met: Whether the budget is met.
    """

    budget: Budget
    dense: Cost
    cost: Cost
    loss: float
    changes: int
    met: bool


def frontier(allocator: Allocator, budgets: Sequence[Budget]) -> Iterator[Point]:
    """Yield what each budget leads to; offers and losses are collected once.

    Raises:
        ConfigError: if a latency is asked for and nothing measures it.
    """
    for budget in budgets:
        choice = allocator.solve(budget)
        yield Point(
            budget=budget,
            dense=allocator.dense,
            cost=choice.cost,
            loss=choice.loss,
            changes=len(choice.chosen),
            met=choice.met,
        )
