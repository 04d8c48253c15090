"""A whole program and its rewritten twin, timed on the example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .costs import Comparison, Costs
from .program import Program, shape_of
from .structure import flatten
from .verifier import preserved


def compare_programs(
    costs: Costs, dense: Program, candidate: Program, what: str, *, training: bool
) -> Comparison:
    """Time two programs of one model on the example, or return what was measured before.

    Args:
        costs: The measured times.
        dense: The program as it is.
        candidate: The program with a change, on the same modules.
        what: The change, in a few words: with the shapes it identifies the measurement.
        training: Time a step with gradients in training mode, else inference.
    """
    shapes = ", ".join(f"{node.name} {list(shape_of(node))}" for node in dense.placeholders)
    kind = "training step" if training else "inference"
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    key = f"{type(dense.model).__name__}, {parameters} parameters, {what} on {shapes} in a {kind}"
    with preserved(dense.model):
        dense.model.train(training)
        return costs.measure(key, _step(dense, training), _step(candidate, training))


def _step(program: Program, training: bool) -> Callable[[], Any]:
    """Return a function that runs a program once, with gradients of what is read in training."""
    tensors, _ = flatten(program.example)
    trained = [p for p in program.model.parameters() if p.requires_grad]

    def step() -> Any:
        with torch.set_grad_enabled(training):
            outputs = program.run(*tensors)
            read = [
                value
                for position, value in enumerate(outputs)
                if position not in program.unread_outputs
                and isinstance(value, torch.Tensor)
                and value.requires_grad
            ]
            if not read or not trained:
                return outputs
            ones = [torch.ones_like(value) for value in read]
            return torch.autograd.grad(read, trained, ones, allow_unused=True)

    return step
