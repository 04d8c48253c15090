"""`optimize` and `plan`: from a model to a cheaper model of the same class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from graphopt.passes.base import Context, Pass, parse_share
from graphopt.passes.calibration import Calibration
from graphopt.passes.calls import expand_arguments, signature_of
from graphopt.passes.costs import Costs
from graphopt.passes.errors import CaptureError, ConfigError
from graphopt.passes.manager import PassManager
from graphopt.passes.plan import CostRecord, Plan, Totals
from graphopt.passes.program import Program
from graphopt.passes.stopwatch import interleaved_ms
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import Verifier, preserved

from .capture import call_arguments, capture
from .datasets import open_batches
from .parts import PartBatches, capture_parts
from .recipes import Recipe, load_recipe
from .runtime import install, install_parts, installation_of

_TOTAL_BUDGET_S = 1.0

Progress = Callable[[str, int, int], None]


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    recipe: str | Path | Recipe | Sequence[str | Pass] = "train",
    budget: float | str | None = None,
    calibration: Any = None,
    ignore: Sequence[str] = (),
    keep: Mapping[str, float | str] | None = None,
    inplace: bool = False,
    limit: int | None = None,
    measure: bool = True,
    cost_cache: str | Path | None = None,
    calibration_store: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Make a model cheaper; the result is of the same class and keeps names, config and hooks.

    Args:
        model: Any PyTorch model.
        example_inputs: A tensor, a tuple or a mapping of keyword arguments; None infers them.
        recipe: "exact", "train", "deploy", a YAML file, or a list of passes.
        budget: Share of the dense forward FLOPs to keep, at the example's sizes: 0.6 or "60%";
            None takes the recipe's.
        calibration: Batches of real inputs: a DataLoader, an iterable, an `.npz`, `.safetensors`
            or `.jsonl` file; scores and repairs then use them.
        ignore: Targets to leave alone: names, or `re:` and a regular expression.
        keep: Share to keep for some targets, pattern -> share.
        inplace: Rewrite this very model instead of a copy.
        limit: Accept only the first N changes.
        measure: Keep a rewrite only if it measures faster here.
        cost_cache: File for measured times.
        calibration_store: Directory that keeps finished statistics, to resume after a stop.
        tokenizer: Directory with the tokenizer for calibration texts.
        progress: Told about every step: label, done, all.

    Returns:
        The optimized model, in the mode (train or eval) of the input.

    Raises:
        GraphoptError: any error a user can cause, with a sentence that says what to do.
    """
    job = _Job(
        recipe=_resolved(load_recipe(recipe), budget, ignore, keep),
        calibration=calibration,
        calibration_store=None if calibration_store is None else Path(calibration_store),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        costs=_costs(model, cost_cache) if measure else None,
        limit=limit,
        progress=progress,
    )
    _refuse_optimized(model)
    target = model if inplace else _copied(model)
    try:
        program = capture(target, example_inputs)
    except CaptureError as error:
        return _optimize_parts(target, example_inputs, job, str(error))
    made = job.manager(program, job.batches(target)).run(program)
    refusal = Verifier(program, training=False).eager_refusal()
    if measure and not inplace and made.changes:
        made = _timed(made, model, program)
    return install(program, _finished(made, job.recipe), eager_refusal=refusal)


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    recipe: str | Path | Recipe | Sequence[str | Pass] = "train",
    budget: float | str | None = None,
    calibration: Any = None,
    ignore: Sequence[str] = (),
    keep: Mapping[str, float | str] | None = None,
    limit: int | None = None,
    measure: bool = False,
    cost_cache: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return what `optimize` would change, and every refusal with its reason; change nothing.

    Works on models whose parameters are on the meta device. Arguments as in `optimize`.

    Raises:
        GraphoptError: as `optimize`.
    """
    job = _Job(
        recipe=_resolved(load_recipe(recipe), budget, ignore, keep),
        calibration=calibration,
        calibration_store=None,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        costs=_costs(model, cost_cache) if measure else None,
        limit=limit,
        progress=progress,
    )
    _refuse_optimized(model)
    try:
        program = capture(model, example_inputs)
    except CaptureError as error:
        return _plan_parts(model, example_inputs, job, str(error))
    made = job.manager(program, job.batches(model)).propose(program)
    return _finished(made, job.recipe)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What was asked for, resolved."""

    recipe: Recipe
    calibration: Any
    calibration_store: Path | None
    tokenizer: Path | None
    costs: Costs | None
    limit: int | None
    progress: Progress | None

    def batches(self, model: nn.Module) -> Iterable[dict[str, Any]] | None:
        """Return the calibration batches as arguments of the model's forward."""
        if self.calibration is None:
            return None
        return open_batches(
            self.calibration,
            model_arguments=tuple(signature_of(model).parameters),
            tokenizer_dir=self.tokenizer,
        )

    def manager(self, program: Program, batches: Iterable[dict[str, Any]] | None) -> PassManager:
        """Return the pipeline for a program."""
        calibration = None
        if batches is not None:
            calibration = Calibration(batches, store=self.calibration_store, progress=self.progress)
        context = Context(
            budget=self.recipe.budget,
            training=self.recipe.training,
            ignore=self.recipe.ignore,
            keep=self.recipe.keep,
            calibration=calibration,
            costs=self.costs,
        )
        return PassManager(
            passes=self.recipe.build_passes(),
            context=context,
            limit=self.limit,
            progress=self.progress,
        )


def _optimize_parts(model: nn.Module, example: Any, job: _Job, reason: str) -> nn.Module:
    """Optimize the parts that can be captured; the model around them runs as it is."""
    batches = job.batches(model)
    plans: dict[str, Plan] = {}
    for part in capture_parts(model, call_arguments(model, example)):
        inner = None if batches is None else PartBatches(model, part.name, batches)
        plans[part.name] = job.manager(part.program, inner).run(part.program)
        install(part.program, plans[part.name])
    return install_parts(model, _finished(_whole(model, plans, reason), job.recipe))


def _plan_parts(model: nn.Module, example: Any, job: _Job, reason: str) -> Plan:
    batches = job.batches(model)
    plans: dict[str, Plan] = {}
    for part in capture_parts(model, call_arguments(model, example)):
        inner = None if batches is None else PartBatches(model, part.name, batches)
        plans[part.name] = job.manager(part.program, inner).propose(part.program)
    return _finished(_whole(model, plans, reason), job.recipe)


def _whole(model: nn.Module, parts: dict[str, Plan], reason: str) -> Plan:
    """Return the plan of a model of which only parts could be captured."""
    if not parts:
        raise CaptureError(f"{reason}; none of its submodules can be captured either")
    names = ", ".join(parts)
    totals = [plan.totals for plan in parts.values() if plan.totals is not None]
    return Plan(
        model_class=type(model).__name__,
        notes=(f"only parts are optimized ({names}), because {reason}",),
        parts=parts,
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


def _costs(model: nn.Module, cache: str | Path | None) -> Costs:
    """Return measured times on the model's device; parts of a meta model are timed on the CPU."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    device = next(iter(devices), torch.device("cpu"))
    return Costs(None if cache is None else Path(cache), device=device)


def _timed(made: Plan, dense: nn.Module, program: Program) -> Plan:
    """Return the plan with the whole model's times on the example: inference, in turns."""
    if made.totals is None or any(p.is_meta for p in dense.parameters()):
        return made
    args, kwargs = expand_arguments(program.signature, program.example)
    tensors, _ = flatten(program.example)
    with preserved(dense), preserved(program.model), torch.no_grad():
        dense.eval()
        program.model.eval()
        before, after = interleaved_ms(
            (lambda: dense(*args, **kwargs), lambda: program.run(*tensors)),
            tensors[0].device,
            _TOTAL_BUDGET_S,
        )
    totals = Totals(
        before=made.totals.before.model_copy(update={"latency_ms": median(before)}),
        after=made.totals.after.model_copy(update={"latency_ms": median(after)}),
    )
    return made.model_copy(update={"totals": totals})


def _refuse_optimized(model: nn.Module) -> None:
    if any(installation_of(module) is not None for module in model.modules()):
        raise ConfigError(
            "this model is already optimized; optimize the dense one, or densify this one first"
        )


def _resolved(
    recipe: Recipe,
    budget: float | str | None,
    ignore: Sequence[str],
    keep: Mapping[str, float | str] | None,
) -> Recipe:
    """Return the recipe with what the caller said on top."""
    share = parse_share(budget, "the budget")
    shares = {
        pattern: parse_share(value, f"the share to keep of {pattern!r}")
        for pattern, value in (keep or {}).items()
    }
    return recipe.model_copy(
        update={
            "budget": recipe.budget if share is None else share,
            "ignore": (*recipe.ignore, *ignore),
            "keep": {**recipe.keep, **shares},
        }
    )


def _finished(made: Plan, recipe: Recipe) -> Plan:
    from graphopt import __version__

    return made.model_copy(
        update={
            "graphopt_version": __version__,
            "torch_version": torch.__version__,
            "recipe": recipe.model_dump(mode="json"),
        }
    )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be copied ({error}); pass inplace=True to rewrite it"
        ) from error
