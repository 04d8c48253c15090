"""`optimize` and `plan`: from a model to a cheaper model of the same class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.passes.base import Context, Pass, parse_share
from graphopt.passes.calibration import Calibration
from graphopt.passes.costs import Costs
from graphopt.passes.errors import ConfigError
from graphopt.passes.manager import PassManager
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.verifier import Verifier

from .capture import capture
from .datasets import open_batches
from .recipes import Recipe, load_recipe
from .runtime import install, installation_of

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
    target = model if inplace else _copied(model)
    run = _prepare(
        target,
        example_inputs,
        recipe=recipe,
        budget=budget,
        calibration=calibration,
        ignore=ignore,
        keep=keep,
        limit=limit,
        costs=Costs(None if cost_cache is None else Path(cost_cache)) if measure else None,
        calibration_store=calibration_store,
        tokenizer=tokenizer,
        progress=progress,
    )
    program, manager, resolved = run
    plan_made = manager.run(program)
    refusal = Verifier(program, training=False).eager_refusal()
    return install(program, _finished(plan_made, resolved), eager_refusal=refusal)


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
    program, manager, resolved = _prepare(
        model,
        example_inputs,
        recipe=recipe,
        budget=budget,
        calibration=calibration,
        ignore=ignore,
        keep=keep,
        limit=limit,
        costs=Costs(None if cost_cache is None else Path(cost_cache)) if measure else None,
        calibration_store=None,
        tokenizer=tokenizer,
        progress=progress,
    )
    return _finished(manager.propose(program), resolved)


def _prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    recipe: str | Path | Recipe | Sequence[str | Pass],
    budget: float | str | None,
    calibration: Any,
    ignore: Sequence[str],
    keep: Mapping[str, float | str] | None,
    limit: int | None,
    costs: Costs | None,
    calibration_store: str | Path | None,
    tokenizer: str | Path | None,
    progress: Progress | None,
) -> tuple[Program, PassManager, Recipe]:
    if installation_of(model) is not None:
        raise ConfigError(
            "this model is already optimized; optimize the dense one, or densify this one first"
        )
    resolved = _resolved(load_recipe(recipe), budget, ignore, keep)
    program = capture(model, example_inputs)
    context = Context(
        budget=resolved.budget,
        training=resolved.training,
        ignore=tuple(resolved.ignore),
        keep=dict(resolved.keep),
        calibration=_calibration(program, calibration, calibration_store, tokenizer, progress),
        costs=costs,
    )
    manager = PassManager(
        passes=resolved.build_passes(), context=context, limit=limit, progress=progress
    )
    return program, manager, resolved


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


def _calibration(
    program: Program,
    source: Any,
    store: str | Path | None,
    tokenizer: str | Path | None,
    progress: Progress | None,
) -> Calibration | None:
    if source is None:
        return None
    batches = open_batches(
        source,
        model_arguments=tuple(program.signature.parameters),
        tokenizer_dir=None if tokenizer is None else Path(tokenizer),
    )
    return Calibration(batches, store=None if store is None else Path(store), progress=progress)


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
