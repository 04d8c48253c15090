"""Plans made true again: structure, values, and which change broke something."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import set_tensor
from .plan import Plan
from .program import Program
from .propagation import refresh
from .registry import pass_named


def apply_plan(program: Program, plan: Plan, *, limit: int | None = None) -> None:
    """Make a plan's changes in a program: structure only, also on meta parameters.

    Args:
        program: A fresh capture of the model the plan was made for.
        plan: The plan.
        limit: Apply only this many changes.

    Raises:
        PlanError: if the plan does not fit the model.
        ConfigError: if it names an unknown pass.
    """
    previous: str | None = None
    for record in plan.changes[:limit]:
        if previous not in (None, record.pass_name):
            refresh(program)
        pass_named(record.pass_name).apply(program, record.change)
        previous = record.pass_name
    if previous is not None:
        refresh(program)


def load_state(program: Program, state: dict[str, torch.Tensor]) -> None:
    """Give parameters and buffers of a program's model new values, by name; tied ones stay tied."""
    for name, value in state.items():
        parent, _, attribute = name.rpartition(".")
        old = getattr(program.module(parent), attribute)
        value = value.to(old.device, old.dtype)
        others = [
            other
            for other, tensor in [
                *program.model.named_parameters(remove_duplicate=False),
                *program.model.named_buffers(remove_duplicate=False),
            ]
            if tensor is old and other != name
        ]
        set_tensor(program.model, name, value)
        new = getattr(program.module(parent), attribute)
        for other in others:
            parent_name, _, other_attribute = other.rpartition(".")
            setattr(program.module(parent_name), other_attribute, new)
    program.changed()


def bisect(is_good: Callable[[int], bool], changes: int) -> int | None:
    """Return the number of the first change that breaks something, None if none does.

    Args:
        is_good: Says whether the first N changes together are fine; `is_good(0)` must hold.
        changes: Changes in all.
    """
    if is_good(changes):
        return None
    low, high = 0, changes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return high
