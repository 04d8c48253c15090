"""A guard for a user's model: scores call the model itself, and parts are judged by the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphopt.passes.calls import expand_arguments, signature_of
from graphopt.passes.drift import Output, compared_outputs, observed_outputs
from graphopt.passes.errors import ConfigError
from graphopt.passes.guard import Guard
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import Verifier, preserved

from .runtime import install

Score = Callable[[nn.Module], Any]
"""Measures a model in evaluation mode, higher is better; it must not change the parameters."""


def guard_of(
    model: nn.Module,
    *,
    max_drift: float | None,
    min_cosine: float | None,
    score: Score | None,
    max_drop: float | None,
    whole: bool,
) -> Guard | None:
    """Return what was asked for as a guard of programs, None if nothing was.

    Args:
        model: The model that will be returned.
        max_drift: See `Guard`.
        min_cosine: See `Guard`.
        score: Called with the model as it would be returned.
        max_drop: See `Guard`; None allows no drop.
        whole: Whether programs are of the whole model. Otherwise they are of parts, and what is
            compared are the outputs of the model around them.

    Raises:
        ConfigError: if a value makes no sense.
    """
    if max_drop is not None and score is None:
        raise ConfigError("max_drop says how far a score may fall; pass score=, too")
    if max_drift is None and min_cosine is None and score is None:
        return None
    if score is not None and not callable(score):
        raise ConfigError(
            "score must be a function that takes the model and returns a number, got "
            f"{type(score).__name__}"
        )
    return Guard(
        max_drift=max_drift,
        min_cosine=min_cosine,
        score=None if score is None else _score_of_program(model, score),
        max_drop=0.0 if max_drop is None else max_drop,
        observe=observed_outputs if whole else functools.partial(_outputs_around, model),
    )


@contextmanager
def installed(program: Program) -> Iterator[nn.Module]:
    """Let a program's model run its graph as the result of `optimize` would, for the time being.

    It is in evaluation mode; modes, buffers, classes and random numbers are restored.
    """
    model = program.model
    classes = [(module, type(module)) for module in model.modules()]
    refusal = Verifier(program, training=False).eager_refusal()
    try:
        yield install(program, Plan(), eager_refusal=refusal)
    finally:
        for module, original in classes:
            module.__class__ = original


def _score_of_program(model: nn.Module, score: Score) -> Callable[[Program], Any]:
    def scored(program: Program) -> Any:
        with installed(program), preserved(model):
            return score(model.eval())

    scored.__name__ = getattr(score, "__name__", type(score).__name__)
    return scored


def _outputs_around(model: nn.Module, program: Program, batch: Mapping[str, Any]) -> list[Output]:
    """Return the outputs of a model of which the program is a part."""
    args, kwargs = expand_arguments(signature_of(model), dict(batch))
    with installed(program), preserved(model), torch.no_grad():
        values, structure = flatten(model.eval()(*args, **kwargs))
    return compared_outputs(values, structure)
