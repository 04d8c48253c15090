"""`optimize` and `plan`: from a model to a cheaper model of the same class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from graphopt.passes.base import Pass
from graphopt.passes.calls import expand_arguments
from graphopt.passes.errors import CaptureError, ConfigError
from graphopt.passes.plan import Plan, Totals
from graphopt.passes.program import Program
from graphopt.passes.stopwatch import interleaved_ms
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import Verifier, preserved

from .capture import call_arguments, capture
from .job import Progress, job_for
from .model_guard import Score
from .recipe_schema import Recipe
from .runtime import install, install_parts, installation_of

_TOTAL_BUDGET_S = 1.0


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    recipe: str | Path | Recipe | Sequence[str | Pass] = "train",
    budget: float | str | None = None,
    calibration: Any = None,
    max_drift: float | str | None = None,
    min_cosine: float | None = None,
    score: Score | None = None,
    max_drop: float | None = None,
    ignore: Sequence[str] = (),
    keep: Mapping[str, float | str] | None = None,
    allocation: str | None = None,
    runtime: str | None = None,
    seed: int = 0,
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
        recipe: A preset ("exact", "train", "fine-tune", "pretrain", "deploy", "deploy-int8",
            "smallest"), a YAML file, or a list of passes.
        budget: What one forward may cost at the example's sizes: 0.6 or "60%" of the dense FLOPs,
            "60% latency", "12ms", "5M parameters" or "40MB"; None takes the recipe's.
        calibration: Batches of real inputs: a DataLoader, an iterable, an `.npz`, `.safetensors`
            or `.jsonl` file; scores and repairs then use them. Under a guard the last quarter is
            held out to check it.
        max_drift: Largest relative error of the outputs on any held-out batch, 0.05 or "5%". This
            and the next three are the guard: changes that violate it are given up, and the report
            names them. None takes the recipe's.
        min_cosine: Smallest mean cosine between the rows of the outputs and of the dense model's.
        score: Any metric, higher is better: called with the model in evaluation mode, before and
            after changes; it must return the same number for the same model.
        max_drop: How much lower than the dense model's the score may be; None allows no drop.
        ignore: Targets to leave alone: names, or `re:` and a regular expression.
        keep: Share to keep for some targets, pattern -> share.
        allocation: "uniform" or "solver" (see `Recipe`), None takes the recipe's.
        runtime: Where inference is timed: "torch", "onnxruntime" or "onnxruntime:" and an execution
            provider; None takes the recipe's.
        seed: Orders equally good choices.
        inplace: Rewrite this very model instead of a copy.
        limit: Accept only the first N changes.
        measure: Keep a rewrite only if it measures faster here.
        cost_cache: File that keeps measured times; default: one in the user's cache directory.
        calibration_store: Directory that keeps finished statistics, to resume after a stop.
        tokenizer: Directory with the tokenizer for calibration texts.
        progress: Told about every step: label, done, all.

    Returns:
        The optimized model, in the mode (train or eval) of the input.

    Raises:
        GraphoptError: any error a user can cause, with a sentence that says what to do.
    """
    job = job_for(
        model,
        recipe,
        budget=budget,
        calibration=calibration,
        max_drift=max_drift,
        min_cosine=min_cosine,
        score=score,
        max_drop=max_drop,
        ignore=ignore,
        keep=keep,
        allocation=allocation,
        runtime=runtime,
        seed=seed,
        limit=limit,
        measure=measure,
        cost_cache=cost_cache,
        calibration_store=calibration_store,
        tokenizer=tokenizer,
        progress=progress,
    )
    _refuse_optimized(model)
    job.guard(model)  # a limit that makes no sense is refused before any work
    target = model if inplace else _copied(model)
    try:
        program = capture(target, example_inputs)
    except CaptureError as error:
        arguments = call_arguments(target, example_inputs)
        made = job.run_parts(target, arguments, str(error))
        return install_parts(target, _finished(made, job.recipe))
    made = job.run(program)
    refusal = Verifier(program, training=False).eager_refusal()
    if measure and not inplace and made.changes and job.recipe.runtime == "torch":
        made = _timed(made, model, program)
    return install(program, _finished(made, job.recipe), eager_refusal=refusal)


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    recipe: str | Path | Recipe | Sequence[str | Pass] = "train",
    budget: float | str | None = None,
    calibration: Any = None,
    max_drift: float | str | None = None,
    min_cosine: float | None = None,
    score: Score | None = None,
    max_drop: float | None = None,
    ignore: Sequence[str] = (),
    keep: Mapping[str, float | str] | None = None,
    allocation: str | None = None,
    runtime: str | None = None,
    seed: int = 0,
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
    job = job_for(
        model,
        recipe,
        budget=budget,
        calibration=calibration,
        max_drift=max_drift,
        min_cosine=min_cosine,
        score=score,
        max_drop=max_drop,
        ignore=ignore,
        keep=keep,
        allocation=allocation,
        runtime=runtime,
        seed=seed,
        limit=limit,
        measure=measure,
        cost_cache=cost_cache,
        tokenizer=tokenizer,
        progress=progress,
    )
    _refuse_optimized(model)
    job.guard(model)
    try:
        program = capture(model, example_inputs)
    except CaptureError as error:
        arguments = call_arguments(model, example_inputs)
        return _finished(job.propose_parts(model, arguments, str(error)), job.recipe)
    return _finished(job.propose(program), job.recipe)


def _timed(made: Plan, dense: nn.Module, program: Program) -> Plan:
    """Return the plan with the whole model's times on the example: inference in torch, in turns.

    Times that the solver measured stay: they are what the budget was met by.
    """
    if made.totals is None or made.totals.after.latency_ms is not None:
        return made
    if any(parameter.is_meta for parameter in dense.parameters()):
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
        before=made.totals.before.timed(median(before)),
        after=made.totals.after.timed(median(after)),
    )
    return made.model_copy(update={"totals": totals})


def _refuse_optimized(model: nn.Module) -> None:
    if any(installation_of(module) is not None for module in model.modules()):
        raise ConfigError(
            "this model is already optimized; optimize the dense one, or densify this one first"
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
