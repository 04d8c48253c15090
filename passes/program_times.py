"""A whole program and its rewritten twin, timed on the example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .costs import Costs
from .facts import facts_of
from .latency import Comparison, predicted
from .program import Program, shape_of
from .roofline import Rates, roofline_ms
from .structure import flatten
from .verifier import preserved
from .workload import Workload


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

    Returns:
        The times; predicted ones where the model has shapes only, or does not run.
    """
    shapes = ", ".join(f"{node.name} {list(shape_of(node))}" for node in dense.placeholders)
    kind = "training step" if training else "inference"
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    key = f"{type(dense.model).__name__}, {parameters} parameters, {what} on {shapes} in a {kind}"

    def prepared(program: Program) -> Callable[[], Any]:
        tensors, _ = flatten(program.example)
        return costs.runner.prepare(Workload(_Run(program), tuple(tensors)), training=training)

    found = None
    if not any(parameter.is_meta for parameter in dense.model.parameters()):
        with preserved(dense.model):
            dense.model.train(training)
            found = costs.compare_prepared(
                key, lambda: prepared(dense), lambda: prepared(candidate)
            )
    if found is not None:
        return found
    rates = costs.rates(dense.dtype or torch.float32)
    return predicted(*(_predicted_ms(p, rates, training) for p in (dense, candidate)))


class _Run(nn.Module):
    """A program as a module from its input tensors to the outputs that are read."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.model = program.model
        self._program = program

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._program.run(*tensors)
        return tuple(
            value
            for position, value in enumerate(outputs)
            if position not in self._program.unread_outputs and isinstance(value, torch.Tensor)
        )


def _predicted_ms(program: Program, rates: Rates, training: bool) -> float:
    """Return the time of a program by the roofline model, operation by operation."""
    return sum(
        roofline_ms(
            node.forward_flops + training * node.backward_flops,
            node.read_bytes + node.written_bytes + node.parameter_bytes,
            rates,
            training=training,
        )
        for node in facts_of(program).nodes.values()
    )
