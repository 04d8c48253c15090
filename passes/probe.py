"""A few samples and what the dense program returns for them: what changes are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration, evaluation_mode
from .objective import Objective, objective_of, squared_errors
from .program import Program, shape_of
from .row_chunks import first_rows, model_room_bytes, row_chunks, row_count
from .structure import flatten

_EXAMPLE_ROWS = 8
"""Rows of the example that losses are measured on where there is no data; many are no better."""


@dataclass(frozen=True)
class Probe:
    """Calls with their dense outputs.

    Attributes:
        objective: Which outputs count.
        calls: Input tensors and, per output that counts, its dense value.
        energies: Per output that counts its squared norm, where it is read.
        dense_loss: What `loss` gives for the dense program.
    """

    objective: Objective
    calls: tuple[tuple[list[Tensor], list[Tensor]], ...]
    energies: tuple[float, ...]
    dense_loss: float

    def loss(self, program: Program) -> float:
        """Return the mean over outputs of their squared relative error, or the model's loss.

        Args:
            program: The program with changes; it runs in evaluation mode.
        """
        if self.objective.loss:
            return _mean_loss(program, self.objective, [tensors for tensors, _ in self.calls])
        totals = [0.0] * len(self.energies)
        for tensors, references in self.calls:
            outputs = _run(program, tensors)
            errors = squared_errors(program, tensors, outputs, references, self.objective)
            totals = [total + error for total, error in zip(totals, errors, strict=True)]
        shares = [t / e for t, e in zip(totals, self.energies, strict=True)]
        return sum(shares) / max(len(shares), 1)


def probe_of(program: Program, calibration: Calibration | None) -> Probe:
    """Return the probe of a dense program: the first samples of the data, or else the example.

    They are so few that the outputs kept take no more than a quarter of the model's size.

    Raises:
        InputError: if a batch does not fit the program.
    """
    if calibration is None:
        tensors, _ = flatten(program.example)
        has_rows = row_count(program, tensors) is not None
        calls = [first_rows(program, tensors, 0, _EXAMPLE_ROWS) if has_rows else tensors]
        with evaluation_mode(program.model):
            objective = objective_of(program, calls)
    else:
        calls, objective = calibration.probe(program), calibration.objective(program)
    room = model_room_bytes(program)
    calls = _limited(program, objective, calls, room // 2)
    # Without gradients only a small part of all values is alive at a time.
    calls = [part for call in calls for part in row_chunks(program, call, 4 * room)]
    if objective.loss:
        dense_loss = _mean_loss(program, objective, calls)
        return Probe(objective, tuple((call, []) for call in calls), (), dense_loss)
    found = []
    energies = [0.0] * len(objective.positions)
    for call in calls:
        outputs = _run(program, call)
        dense = [outputs[index].detach().clone() for index in objective.positions]
        zeros = [torch.zeros((), dtype=value.dtype, device=value.device) for value in dense]
        squares = squared_errors(program, call, outputs, zeros, objective)
        energies = [total + square for total, square in zip(energies, squares, strict=True)]
        found.append((call, dense))
    return Probe(objective, tuple(found), tuple(energies), 0.0)


def _mean_loss(program: Program, objective: Objective, calls: Sequence[list[Tensor]]) -> float:
    """Return the model's own loss, every label counting the same."""
    weights = [objective.weight(call) for call in calls]
    losses = [float(_run(program, call)[objective.positions[0]]) for call in calls]
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / max(sum(weights), 1.0)


def _run(program: Program, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    with evaluation_mode(program.model), torch.no_grad():
        return program.run(*tensors)


def _limited(
    program: Program, objective: Objective, calls: Sequence[list[Tensor]], room_bytes: int
) -> list[list[Tensor]]:
    """Return the first calls and rows whose outputs fit some room, one row at least."""
    nodes: Any = program.result.args[0]
    example = sum(
        torch.Size(shape_of(nodes[index])).numel() * nodes[index].meta["val"].element_size()
        for index in objective.positions
    )
    first = sum(torch.Size(shape_of(node)).numel() for node in program.placeholders)
    kept: list[list[Tensor]] = []
    for call in calls:
        size = example * sum(tensor.numel() for tensor in call) / max(first, 1)
        count = row_count(program, call)
        if count is not None and size > room_bytes:
            part = first_rows(program, call, 0, max(1, int(room_bytes * count / size)))
            return [*kept, part] if room_bytes * count >= size or not kept else kept
        kept.append(call)
        room_bytes -= int(size)
    return kept
