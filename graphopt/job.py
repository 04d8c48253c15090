"""What `optimize` and `plan` were asked for, resolved, and how it is carried out on a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from graphopt.passes.allocation.frontier import Point
from graphopt.passes.allocation.sweep import sweep
from graphopt.passes.base import Context, Pass
from graphopt.passes.budget import Budget, parse_budget
from graphopt.passes.calibration import Calibration
from graphopt.passes.calls import signature_of
from graphopt.passes.costs import Costs
from graphopt.passes.errors import CaptureError, ConfigError
from graphopt.passes.guard import Guard
from graphopt.passes.manager import PassManager
from graphopt.passes.plan import CostRecord, Plan, Totals
from graphopt.passes.program import Program

from .datasets import open_batches
from .held_out import Batch, Split, split
from .model_guard import Score, guard_of
from .parts import Part, PartBatches, capture_parts
from .recipe_schema import Allocation, Recipe
from .recipes import load_recipe
from .runtime import install
from .timing import costs_for

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with what the caller said on top, and data and devices to work with.

    Attributes:
        recipe: As resolved.
        calibration: Where batches come from (see `open_batches`), None without data.
        store: Directory of what can be resumed.
        tokenizer: Directory with the tokenizer for texts.
        costs: Measured times, None measures nothing.
        limit: Accept only the first N changes.
        seed: Of the solver.
        score: The user's metric, None without one.
        max_drop: How much the score may drop.
        progress: Told about every step.
    """

    recipe: Recipe
    calibration: Any
    store: Path | None
    tokenizer: Path | None
    costs: Costs | None
    limit: int | None
    seed: int
    score: Score | None
    max_drop: float | None
    progress: Progress | None

    def guard(self, model: nn.Module, *, whole: bool = True) -> Guard | None:
        """Return the guard of a model's programs, or of its parts' (see `guard_of`)."""
        return guard_of(
            model,
            max_drift=self.recipe.max_drift,
            min_cosine=self.recipe.min_cosine,
            score=self.score,
            max_drop=self.max_drop,
            whole=whole,
        )

    def unguarded(self) -> Job:
        """Return the same job without a guard."""
        recipe = self.recipe.model_copy(update={"max_drift": None, "min_cosine": None})
        return replace(self, recipe=recipe, score=None, max_drop=None)

    def run(self, program: Program) -> Plan:
        """Change a program of a whole model; return what was done."""
        model = program.model
        data = self._data(model, program.example, by_rows=_has_dynamic_rows(program))
        made = self._manager(data, data.fitted, self.guard(model)).run(program)
        return _noted(made, data)

    def propose(self, program: Program) -> Plan:
        """Return what would be done to a program of a whole model; the guard is not checked."""
        model = program.model
        data = self._data(model, program.example, by_rows=_has_dynamic_rows(program))
        made = self._manager(data, data.fitted, self.guard(model)).propose(program)
        return self._unchecked(made)

    def frontier(self, program: Program, budgets: Sequence[Budget]) -> Iterator[Point]:
        """Yield what the solver reaches for a program of a whole model at each budget."""
        data = self._data(program.model, program.example, by_rows=_has_dynamic_rows(program))
        manager = self._manager(data, data.fitted, None)
        return sweep(
            program,
            manager.passes,
            manager.context,
            budgets,
            seed=self.seed,
            store=self.store,
            progress=self.progress,
        )

    def run_parts(self, model: nn.Module, arguments: dict[str, Any], reason: str) -> Plan:
        """Change and install the parts of a model that can be captured; return what was done.

        The guard looks at the outputs of the model around them.

        Args:
            model: The model; around its parts it runs as it is.
            arguments: Canonical arguments of its forward.
            reason: Why it cannot be captured as a whole.

        Raises:
            CaptureError: if none of its parts can be captured either.
        """
        parts = self._parts(model, arguments, reason)
        data = self._data(model, arguments)
        guard = self.guard(model, whole=False)
        prepared = None if guard is None else guard.prepared(parts[0].program, data.held_out)
        plans: dict[str, Plan] = {}
        for part in parts:
            plans[part.name] = self._part_manager(model, part, data, prepared).run(part.program)
            install(part.program, plans[part.name])
        return _noted(_of_parts(model, plans, reason), data)

    def propose_parts(self, model: nn.Module, arguments: dict[str, Any], reason: str) -> Plan:
        """Return what would be done to the parts of a model; arguments as in `run_parts`."""
        parts = self._parts(model, arguments, reason)
        data = self._data(model, arguments)
        guard = self.guard(model, whole=False)
        plans = {
            part.name: self._part_manager(model, part, data, guard).propose(part.program)
            for part in parts
        }
        return self._unchecked(_of_parts(model, plans, reason))

    @property
    def _is_guarded(self) -> bool:
        limits = (self.recipe.max_drift, self.recipe.min_cosine, self.score)
        return any(limit is not None for limit in limits)

    def _unchecked(self, made: Plan) -> Plan:
        if not self._is_guarded:
            return made
        note = "a plan is not checked against the guard; optimize may give changes up"
        return made.model_copy(update={"notes": (*made.notes, note)})

    def _data(self, model: nn.Module, example: Batch, *, by_rows: bool = True) -> Split:
        """Return the batches to fit changes to and, under a guard, those to check them on."""
        if self.calibration is None:
            note = "the guard was checked on the example inputs: there is no calibration data"
            return Split(None, (example,), note)
        batches = open_batches(
            self.calibration,
            model_arguments=tuple(signature_of(model).parameters),
            tokenizer_dir=self.tokenizer,
        )
        return split(batches, by_rows=by_rows) if self._is_guarded else Split(batches, ())

    def _parts(self, model: nn.Module, arguments: dict[str, Any], reason: str) -> list[Part]:
        budget = parse_budget(self.recipe.budget)
        if budget is not None and not budget.relative:
            raise ConfigError(
                f"a budget of {budget} is for the whole model, of which only parts can be captured "
                f"({reason}); pass a share such as '60%'"
            )
        parts = capture_parts(model, arguments)
        if not parts:
            raise CaptureError(f"{reason}; none of its submodules can be captured either")
        return parts

    def _part_manager(
        self, model: nn.Module, part: Part, data: Split, guard: Guard | None
    ) -> PassManager:
        fitted = None if data.fitted is None else PartBatches(model, part.name, data.fitted)
        return self._manager(data, fitted, guard)

    def _manager(
        self, data: Split, fitted: Iterable[Mapping[str, Any]] | None, guard: Guard | None
    ) -> PassManager:
        calibration = None
        if fitted is not None:
            calibration = Calibration(fitted, store=self.store, progress=self.progress)
        recipe = self.recipe
        return PassManager(
            passes=recipe.build_passes(),
            context=Context(
                training=recipe.training,
                ignore=recipe.ignore,
                keep=recipe.keep,
                calibration=calibration,
                costs=self.costs,
            ),
            budget=parse_budget(recipe.budget),
            allocation=recipe.allocation,
            guard=guard,
            guard_batches=data.held_out,
            seed=self.seed,
            store=self.store,
            limit=self.limit,
            progress=self.progress,
        )


def job_for(
    model: nn.Module,
    recipe: str | Path | Recipe | Sequence[str | Pass],
    *,
    calibration: Any,
    seed: int,
    measure: bool,
    cost_cache: str | Path | None,
    tokenizer: str | Path | None,
    progress: Progress | None,
    calibration_store: str | Path | None = None,
    limit: int | None = None,
    score: Score | None = None,
    max_drop: float | None = None,
    **settings: Any,
) -> Job:
    """Return what was asked for of a model; arguments as in `graphopt.optimize`.

    Raises:
        ConfigError: if there is no such recipe or runtime, or a value is not valid.
        MissingExtraError: if the runtime is not installed.
    """
    resolved = resolve_recipe(recipe, **settings)
    return Job(
        recipe=resolved,
        calibration=calibration,
        store=None if calibration_store is None else Path(calibration_store),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        costs=costs_for(model, resolved.runtime, cost_cache) if measure else None,
        limit=limit,
        seed=seed,
        score=score,
        max_drop=max_drop,
        progress=progress,
    )


def resolve_recipe(
    recipe: str | Path | Recipe | Sequence[str | Pass],
    *,
    ignore: Sequence[str],
    allocation: str | None = None,
    **settings: Any,
) -> Recipe:
    """Return a recipe with what the caller said on top; what is None stays as it is.

    Raises:
        ConfigError: if there is no such recipe, or a value is not valid.
    """
    if allocation is not None and allocation not in get_args(Allocation):
        known = " or ".join(map(repr, get_args(Allocation)))
        raise ConfigError(f"allocation must be {known}, got {allocation!r}")
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    return load_recipe(recipe).with_settings(allocation=allocation, ignore=patterns, **settings)


def _noted(made: Plan, data: Split) -> Plan:
    """Return the plan with what is to be said of the data that the guard looked at."""
    if made.guard is None or data.note is None:
        return made
    return made.model_copy(update={"notes": (*made.notes, data.note)})


def _of_parts(model: nn.Module, parts: dict[str, Plan], reason: str) -> Plan:
    """Return the plan of a model of which only parts could be captured."""
    names = ", ".join(parts)
    totals = [plan.totals for plan in parts.values() if plan.totals is not None]
    return Plan(
        model_class=type(model).__name__,
        notes=(f"only parts are optimized ({names}), because {reason}",),
        parts=parts,
        guard=list(parts.values())[-1].guard,  # it looked at the whole model
        totals=Totals(
            before=_sum([total.before for total in totals]),
            after=_sum([total.after for total in totals]),
        ),
    )


def _sum(costs: Sequence[CostRecord]) -> CostRecord:
    return CostRecord(
        flops=sum(cost.flops for cost in costs),
        size_bytes=sum(cost.size_bytes for cost in costs),
        parameters=sum(cost.parameters for cost in costs),
    )


def _has_dynamic_rows(program: Program) -> bool:
    return any(0 in dimensions for dimensions in program.dynamic_dimensions().values())
