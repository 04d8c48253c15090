"""What accuracy costs: the solver at many budgets, as points that can be drawn."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.passes.allocation.frontier import Point
from graphopt.passes.base import Cost, Pass
from graphopt.passes.budget import Budget, parse_budget
from graphopt.passes.errors import ConfigError

from .capture import capture
from .files import new_directory
from .frontier_plot import draw
from .job import Progress, job_for
from .recipe_schema import Recipe

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_WIDTH_COLUMNS = 120
DATA_FILE = "frontier.json"
PICTURE_FILE = "frontier.png"


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One budget and what it leads to.

    Attributes:
        budget: As `parse_budget` reads it.
        met: Whether it is met.
        relative_error: Of the model's outputs with all changes: what a guard calls drift, on the
            calibration data, before the changes that follow each other are fitted to each other.
        cost: Of the whole model; its time is None where nothing was measured.
        changes: Number of changes.
    """

    budget: str
    met: bool
    relative_error: float
    cost: Cost
    changes: int


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Points from the largest budget to the smallest; prints as a table.

    Attributes:
        model_class: Class name of the model.
        recipe: Name of the recipe.
        runtime: Where times were measured.
        dense: Cost of the dense model.
        points: What the budgets lead to.
        notes: What a user should know.
    """

    model_class: str
    recipe: str
    runtime: str
    dense: Cost
    points: tuple[FrontierPoint, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_timed(self) -> bool:
        """Whether every point has a time."""
        costs = [self.dense, *(point.cost for point in self.points)]
        return all(cost.latency_ms is not None for cost in costs)

    def to_json(self) -> dict[str, Any]:
        """Return the frontier as plain data."""
        return dataclasses.asdict(self)

    def save(self, directory: str | Path) -> None:
        """Write `frontier.json` and `frontier.png` to a new directory, or over earlier ones.

        Raises:
            CheckpointError: if the directory holds other files, or cannot be written.
            MissingExtraError: if matplotlib is not installed.
        """
        with new_directory(
            Path(directory), replaceable=frozenset({DATA_FILE, PICTURE_FILE})
        ) as target:
            text = json.dumps(self.to_json(), indent=1)
            (target / DATA_FILE).write_text(text, encoding="utf-8")
            draw(
                target / PICTURE_FILE,
                [_amount(point.cost, timed=self.is_timed) for point in self.points],
                [point.relative_error for point in self.points],
                dense=_amount(self.dense, timed=self.is_timed),
                cost_label=f"latency in {self.runtime}, ms" if self.is_timed else "forward GFLOPs",
                title=f"{self.model_class}, recipe {self.recipe}",
            )

    def __str__(self) -> str:
        """Return the table as text."""
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDTH_COLUMNS).print(self)
        return text.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a heading, the points and the notes."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"{self.model_class}, recipe {self.recipe}, {self.runtime}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for column in ("budget", "met", "ms", "FLOPs", "parameters", "changes", "relative error"):
            table.add_column(column)
        rows = [("(dense)", "", self.dense, 0, 0.0)]
        rows += [
            (point.budget, "yes" if point.met else "no", point.cost, point.changes, error)
            for point in self.points
            for error in [point.relative_error]
        ]
        for budget, met, cost, changes, error in rows:
            time = "-" if cost.latency_ms is None else f"{cost.latency_ms:.3g}"
            flops, parameters = f"{cost.flops:.3g}", f"{cost.parameters:.3g}"
            cells = (budget, met, time, flops, parameters, str(changes), f"{error:.2g}")
            table.add_row(*map(Text, cells))
        yield table
        for note in self.notes:
            yield Text(f"note: {note}")


def frontier(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    recipe: str | Path | Recipe | Sequence[str | Pass] = "deploy",
    budgets: Sequence[float | str] | None = None,
    calibration: Any = None,
    ignore: Sequence[str] = (),
    keep: Mapping[str, float | str] | None = None,
    runtime: str | None = None,
    seed: int = 0,
    measure: bool = True,
    cost_cache: str | Path | None = None,
    calibration_store: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Return what the solver reaches at many budgets; change nothing.

    An interruption (Ctrl-C) returns the points that are known, if there are any.

    Args:
        model: Any PyTorch model that can be captured as a whole.
        example_inputs: A tensor, a tuple or a mapping of keyword arguments; None infers them.
        recipe: As for `graphopt.optimize`; its budget and its guard play no part.
        budgets: Budgets as for `graphopt.optimize`; default: 90 % to 30 % of the latency, of the
            FLOPs where nothing is measured.
        calibration: Batches of real inputs, as for `graphopt.optimize`.
        ignore: Targets to leave alone.
        keep: Share to keep for some targets.
        runtime: Where inference is timed; None takes the recipe's.
        seed: Orders equally good choices.
        measure: Whether to time anything.
        cost_cache: File that keeps measured times; default: one in the user's cache directory.
        calibration_store: Directory that keeps statistics and losses, to resume after a stop.
        tokenizer: Directory with the tokenizer for calibration texts.
        progress: Told about every step: label, done, all.

    Raises:
        GraphoptError: as `graphopt.optimize`.
    """
    wanted = _budgets(budgets, measure)
    job = job_for(
        model,
        recipe,
        calibration=calibration,
        ignore=ignore,
        keep=keep,
        runtime=runtime,
        seed=seed,
        measure=measure,
        cost_cache=cost_cache,
        calibration_store=calibration_store,
        tokenizer=tokenizer,
        progress=progress,
    ).unguarded()
    points: list[Point] = []
    notes: list[str] = []
    try:
        for point in job.frontier(capture(model, example_inputs), wanted):
            points.append(point)
            if progress is not None:
                progress("budgets", len(points), len(wanted))
    except KeyboardInterrupt:
        if not points:
            raise
        notes.append(f"interrupted: {len(points)} of {len(wanted)} budgets are solved")
    return Frontier(
        model_class=type(model).__name__,
        recipe=job.recipe.name,
        runtime=job.recipe.runtime,
        dense=points[-1].dense,
        points=tuple(_shown(point) for point in points),
        notes=tuple(notes),
    )


def _budgets(budgets: Sequence[float | str] | None, measure: bool) -> list[Budget]:
    resource = "latency" if measure else "flops"
    texts = [f"{share:.0%} {resource}" for share in _SHARES] if budgets is None else budgets
    wanted = [budget for budget in map(parse_budget, texts) if budget is not None]
    if not wanted:
        raise ConfigError("a frontier needs at least one budget, such as '60%'")
    return wanted


def _shown(point: Point) -> FrontierPoint:
    return FrontierPoint(
        budget=str(point.budget),
        met=point.met,
        relative_error=max(point.loss, 0.0) ** 0.5,
        cost=point.cost,
        changes=point.changes,
    )


def _amount(cost: Cost, *, timed: bool) -> float:
    if timed:
        assert cost.latency_ms is not None
        return cost.latency_ms
    return cost.flops / 1e9
