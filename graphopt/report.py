"""What was done to a model, layer by layer, and what it costs before and after."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.passes.budget import Budget, parse_budget
from graphopt.passes.errors import PlanError
from graphopt.passes.facts import module_costs
from graphopt.passes.guard import GIVEN_UP
from graphopt.passes.plan import CostRecord, GuardRecord, Plan, Totals
from graphopt.passes.program import Program

from .report_tables import (
    budget_line,
    given_up_table,
    guard_line,
    kept_table,
    refused_table,
    totals_table,
)
from .runtime import installation_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_WIDTH_COLUMNS = 140
_DECISIONS = ("kept", "given up", "refused")


@dataclass(frozen=True)
class ReportRow:
    """What one pass decided about one layer.

    Attributes:
        pass_name: The pass.
        target: The layer: a module or parameter name.
        decision: "kept" if the change is in place, "given up" if the guard had it taken back,
            "refused" if there was none.
        reason: What changed, or why nothing did.
        before: Cost of the layer before; None where a refused layer was not counted.
        after: Its cost now.
        predicted_error: Relative output error that the pass expected, None where unknown.
        measured_error: Relative output error on the example, None where not measured.
        loss: What it was expected to add to the squared relative error of the model's outputs.
        loss_source: Where that is from: "data", "measured" or "weights".
    """

    pass_name: str
    target: str
    decision: str
    reason: str
    before: CostRecord | None = None
    after: CostRecord | None = None
    predicted_error: float | None = None
    measured_error: float | None = None
    loss: float | None = None
    loss_source: str = ""


@dataclass(frozen=True)
class BudgetUse:
    """A budget and what was reached.

    Attributes:
        budget: What was asked for.
        allowed: That as an amount, None where the dense model's cost is not known.
        reached: What the model costs now, None where that is not known.
    """

    budget: Budget
    allowed: float | None
    reached: float | None


@dataclass(frozen=True)
class Report:
    """A plan as rows and totals; prints as tables.

    Attributes:
        model_class: Class name of the model.
        recipe: Name of the recipe.
        rows: One per decision: the changes in their order, then the others.
        totals: Cost of the whole model before and after, None if the plan has none.
        inputs: Names and shapes of the inputs at which costs are counted.
        notes: What capture and the manager want a user to know.
        budget: The budget and what was reached, None without a budget.
        guard: What the guard asked for and found, None if nothing was checked.
        runtime: Where the times of layers are from.
    """

    model_class: str
    recipe: str
    rows: tuple[ReportRow, ...]
    totals: Totals | None
    inputs: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]
    budget: BudgetUse | None = None
    guard: GuardRecord | None = None
    runtime: str = "torch"

    @property
    def kept(self) -> list[ReportRow]:
        """The changes that are in place."""
        return [row for row in self.rows if row.decision == "kept"]

    @property
    def given_up(self) -> list[ReportRow]:
        """The changes that were taken back because of the guard."""
        return [row for row in self.rows if row.decision == "given up"]

    @property
    def refused(self) -> list[ReportRow]:
        """What was left alone."""
        return [row for row in self.rows if row.decision == "refused"]

    @property
    def flops_share(self) -> float | None:
        """FLOPs now over FLOPs before, None if unknown."""
        if self.totals is None or not self.totals.before.flops:
            return None
        return self.totals.after.flops / self.totals.before.flops

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, with the keys of a plan; units as in `CostRecord`."""
        return {
            "model_class": self.model_class,
            "recipe": self.recipe,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "totals": None if self.totals is None else self.totals.model_dump(mode="json"),
            "flops_share": self.flops_share,
            "budget": None if self.budget is None else _budget_json(self.budget),
            "guard": None if self.guard is None else self.guard.model_dump(mode="json"),
            "runtime": self.runtime,
            "changes": [_row_json(row) for row in self.kept],
            "given_up": [_row_json(row) for row in self.given_up],
            "misses": [_row_json(row) for row in self.refused],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Return the tables as text."""
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDTH_COLUMNS).print(self)
        return text.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a heading, one table per question, and the notes."""
        from rich.text import Text

        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items())
        yield Text(f"{self.model_class}, recipe {self.recipe}" + (f", at {shapes}" * bool(shapes)))
        if self.totals is not None:
            yield totals_table(self.totals)
        if self.budget is not None:
            yield Text(budget_line(self.budget))
        if self.guard is not None:
            yield Text(guard_line(self.guard))
        if self.kept:
            yield kept_table(self.kept, self.runtime)
        else:
            yield Text("Nothing was changed.")
        if self.given_up:
            yield given_up_table(self.given_up)
        if self.refused:
            yield refused_table(self.refused)
        for note in self.notes:
            yield Text(f"note: {note}")


def report(model: nn.Module) -> Report:
    """Return what was done to an optimized model.

    Args:
        model: The result of `graphopt.optimize` or `graphopt.load`.

    Raises:
        PlanError: if it is not an optimized model.
    """
    installation = installation_of(model)
    if installation is None:
        raise PlanError(
            f"expected a model that graphopt.optimize or graphopt.load returned, got a "
            f"{type(model).__name__} with nothing to report; optimize it first"
        )
    return plan_report(installation.plan, installation.program)


def plan_report(plan: Plan, program: Program | None = None) -> Report:
    """Return a plan as a report.

    Args:
        plan: The plan.
        program: The program it was made for or applied to, if layers that were left alone are to
            be counted as well.
    """
    costs = {} if program is None else _costs_by_layer(program)
    return Report(
        model_class=plan.model_class,
        recipe=str(plan.recipe.get("name", "custom")),
        rows=tuple(sorted(_rows(plan, costs), key=lambda row: _DECISIONS.index(row.decision))),
        totals=plan.totals,
        inputs={record.name: record.shape for record in plan.inputs},
        notes=(
            *plan.notes,
            *(f"{name}: {note}" for name, part in plan.parts.items() for note in part.notes),
        ),
        budget=_budget_use(plan),
        guard=plan.guard,
        runtime=str(plan.recipe.get("runtime", "torch")),
    )


def _budget_use(plan: Plan) -> BudgetUse | None:
    budget = parse_budget(plan.recipe.get("budget"))
    if budget is None:
        return None
    if plan.totals is None:
        return BudgetUse(budget, None if budget.relative else budget.amount, None)
    before = _amount(plan.totals.before, budget)
    allowed = budget.amount
    if budget.relative:
        return BudgetUse(
            budget, None if before is None else allowed * before, _amount(plan.totals.after, budget)
        )
    return BudgetUse(budget, allowed, _amount(plan.totals.after, budget))


def _amount(cost: CostRecord, budget: Budget) -> float | None:
    return {
        "flops": cost.flops,
        "parameters": cost.parameters,
        "bytes": cost.size_bytes,
        "latency": cost.latency_ms,
    }[budget.resource]


def _rows(plan: Plan, costs: Mapping[str, CostRecord], part: str = "") -> Iterator[ReportRow]:
    """Yield the decisions of a plan, then those of its parts under their full names."""
    for change in plan.changes:
        yield ReportRow(
            pass_name=change.pass_name,
            target=part + change.target,
            decision="kept",
            reason=change.summary,
            before=change.before,
            after=change.after,
            predicted_error=change.predicted_error,
            measured_error=change.measured_error,
            loss=change.loss,
            loss_source=change.loss_source,
        )
    for miss in plan.misses:
        cost = _cost_of(miss.target, costs)
        given_up = miss.reason.startswith(GIVEN_UP)
        yield ReportRow(
            pass_name=miss.pass_name,
            target=part + miss.target,
            decision="given up" if given_up else "refused",
            reason=miss.reason.removeprefix(GIVEN_UP),
            before=cost,
            after=cost,
        )
    for name, inner in plan.parts.items():
        yield from _rows(inner, {}, f"{part}{name}.")


def _costs_by_layer(program: Program) -> dict[str, CostRecord]:
    return {
        name: CostRecord(flops=cost.flops, size_bytes=cost.size_bytes, parameters=cost.parameters)
        for name, cost in module_costs(program).items()
    }


def _cost_of(target: str, costs: Mapping[str, CostRecord]) -> CostRecord | None:
    """Return the cost of a module, named by itself, by its parameter, or with a remark behind."""
    name = target.partition(" ")[0]
    return costs.get(name) or costs.get(name.rpartition(".")[0])


def _row_json(row: ReportRow) -> dict[str, Any]:
    data = dataclasses.asdict(row)
    data["pass"] = data.pop("pass_name")
    for when in ("before", "after"):
        cost: CostRecord | None = getattr(row, when)
        data[when] = None if cost is None else cost.model_dump(mode="json")
    return data


def _budget_json(use: BudgetUse) -> dict[str, Any]:
    return {
        "asked": str(use.budget),
        "resource": use.budget.resource,
        "allowed": use.allowed,
        "reached": use.reached,
    }
