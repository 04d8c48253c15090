"""What was done to a model, layer by layer, and what it costs before and after."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.passes.errors import PlanError
from graphopt.passes.facts import module_costs
from graphopt.passes.plan import CostRecord, Plan, Totals
from graphopt.passes.program import Program

from .runtime import installation_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

_WIDTH_COLUMNS = 140
_TARGETS_SHOWN = 3


@dataclass(frozen=True)
class ReportRow:
    """What one pass decided about one layer.

    Attributes:
        pass_name: The pass.
        target: The layer: a module or parameter name.
        decision: "kept" if the change is in place, "refused" if the layer is as it was.
        reason: What changed, or why nothing did.
        before: Cost of the layer before; None where a refused layer was not counted.
        after: Its cost now.
        predicted_error: Relative output error that the pass expected, None where unknown.
        measured_error: Relative output error on the calibration data, None where not measured.
    """

    pass_name: str
    target: str
    decision: str
    reason: str
    before: CostRecord | None = None
    after: CostRecord | None = None
    predicted_error: float | None = None
    measured_error: float | None = None


@dataclass(frozen=True)
class Report:
    """A plan as rows and totals; prints as tables.

    Attributes:
        model_class: Class name of the model.
        recipe: Name of the recipe.
        rows: One per decision: the changes in their order, then the refusals.
        totals: Cost of the whole model before and after, None if the plan has none.
        inputs: Names and shapes of the inputs at which costs are counted.
        notes: What capture and the manager want a user to know.
    """

    model_class: str
    recipe: str
    rows: tuple[ReportRow, ...]
    totals: Totals | None
    inputs: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]

    @property
    def kept(self) -> list[ReportRow]:
        """The changes that are in place."""
        return [row for row in self.rows if row.decision == "kept"]

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
            "changes": [_row_json(row) for row in self.kept],
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
            yield _totals_table(self.totals)
        if self.kept:
            yield _kept_table(self.kept)
        else:
            yield Text("Nothing was changed.")
        if self.refused:
            yield _refused_table(self.refused)
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
        rows=tuple(sorted(_rows(plan, costs), key=lambda row: row.decision == "refused")),
        totals=plan.totals,
        inputs={record.name: record.shape for record in plan.inputs},
        notes=(
            *plan.notes,
            *(f"{name}: {note}" for name, part in plan.parts.items() for note in part.notes),
        ),
    )


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
        )
    for miss in plan.misses:
        cost = _cost_of(miss.target, costs)
        yield ReportRow(
            pass_name=miss.pass_name,
            target=part + miss.target,
            decision="refused",
            reason=miss.reason,
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


def _totals_table(totals: Totals) -> Table:
    before, after = totals.before, totals.after
    shown = [
        ("FLOPs (forward)", before.flops, after.flops, _count),
        ("parameters", before.parameters, after.parameters, _count),
        ("size, bytes", before.size_bytes, after.size_bytes, _count),
        ("measured, ms", before.latency_ms, after.latency_ms, _milliseconds),
    ]
    return _table(
        "Whole model",
        ("", "before", "after", "after / before"),
        [(name, text(old), text(new), _share(old, new)) for name, old, new, text in shown],
    )


def _kept_table(rows: list[ReportRow]) -> Table:
    cells = []
    for row in rows:
        assert row.before is not None
        assert row.after is not None
        cells.append(
            (
                row.target,
                row.pass_name,
                row.reason,
                f"{_count(row.before.flops)} → {_count(row.after.flops)}",
                f"{_count(row.before.parameters)} → {_count(row.after.parameters)}",
                _pair(_milliseconds, row.before.latency_ms, " → ", row.after.latency_ms),
                _pair(_error, row.predicted_error, " / ", row.measured_error),
            )
        )
    columns = ("layer", "pass", "change", "FLOPs", "parameters", "ms", "error predicted / measured")
    return _table(f"Changed: {len(rows)}", columns, cells)


def _refused_table(rows: list[ReportRow]) -> Table:
    """One line per pass and reason, because many layers share one."""
    groups: dict[tuple[str, str], list[ReportRow]] = {}
    for row in rows:
        groups.setdefault((row.pass_name, row.reason), []).append(row)
    cells = []
    for (pass_name, reason), same in groups.items():
        names = ", ".join(row.target for row in same[:_TARGETS_SHOWN])
        more = len(same) - _TARGETS_SHOWN
        flops = sum(row.before.flops for row in same if row.before is not None)
        cells.append(
            (
                names + (f" and {more} more" if more > 0 else ""),
                pass_name,
                reason,
                _count(flops) if any(row.before for row in same) else "-",
            )
        )
    return _table(f"Left as it was: {len(rows)}", ("layer", "pass", "reason", "FLOPs"), cells)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "pass")
    for row in rows:
        table.add_row(*map(Text, row))  # as text, because "[8, 128]" is not markup
    return table


def _count(value: float | None) -> str:
    """Return a count with three digits and a decimal prefix."""
    if value is None:
        return "-"
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}P"


def _share(before: float | None, after: float | None) -> str:
    return f"{after / before:.1%}" if before and after is not None else "-"


def _pair(
    text: Callable[[float | None], str], first: float | None, between: str, second: float | None
) -> str:
    return "-" if first is None and second is None else f"{text(first)}{between}{text(second)}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
