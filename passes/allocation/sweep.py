"""A pipeline at many budgets: exact passes first, then the solver for the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from graphopt.passes.base import Context, Pass
from graphopt.passes.budget import Budget
from graphopt.passes.errors import ConfigError
from graphopt.passes.program import Program
from graphopt.passes.propagation import refresh
from graphopt.passes.rewriting import make_change
from graphopt.passes.snapshot import twin_of

from .allocator import Progress
from .frontier import Point, frontier
from .sources import allocator_for


def sweep(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    budgets: Sequence[Budget],
    *,
    seed: int = 0,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Point]:
    """Yield what each budget leads to; the program stays as it is.

    Args:
        program: A captured program.
        passes: The pipeline.
        context: What the passes may know.
        budgets: What to solve for.
        seed: Orders equally good choices.
        store: Directory for what was estimated and measured.
        progress: Told about losses.

    Raises:
        ConfigError: if all passes are exact, or a latency is asked for and nothing measures it.
        PreconditionError: if a pass cannot run on this program.
    """
    steps = [step for step in passes if not (step.inference_only and context.training)]
    current = twin_of(program)
    for step in steps:
        step.requires(program, context)
        step.note_unread(current)
    first = next((place for place, step in enumerate(steps) if not step.exact), None)
    if first is None:
        raise ConfigError(
            "a frontier needs a pass that trades accuracy for cost, such as prune-channels; all "
            "of these are exact"
        )
    for step in steps[:first]:
        for candidate in step.propose(current, context).candidates:
            make_change(step, current, candidate, context)
        refresh(current)
    allocator = allocator_for(
        current,
        steps[first:],
        context,
        dense=twin_of(program),
        seed=seed,
        store=store,
        progress=progress,
    )
    yield from frontier(allocator, budgets)
